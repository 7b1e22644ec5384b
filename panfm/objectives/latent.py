"""Latent self-distillation: regress the teacher's features of what was hidden.

    target   y = standardise(mean over the last blocks of LayerNorm(teacher block output))
    tokens   mean over hidden places of SmoothL1(guess - y)
    summary  mean over the subject's streams of SmoothL1(summary guessed from CLS - mean of y over the stream)
    loss     tokens + summary-weight x summary

Targets are standardised per place and feature by running statistics: what is the same for everybody (which organ is
there) then carries no reward, only what differs between patients does (LAB.md section 2).

Source: data2vec (Baevski et al. 2022) for targets; the CLS summary and the standardisation are this project's.
Shape legend: B subjects, N places, M places in the vocabulary, S streams, D width.
"""

import torch
from torch import Tensor
from torch.nn import functional

from panfm.config.run import LatentConfig
from panfm.models import PanModel
from panfm.models.backbone import Encoded
from panfm.models.tokens import Layout, gather_tokens
from panfm.objectives.objective import View, mean_over


class RunningMoments:
    """Mean and variance per row and feature, by exponential averages that start as plain averages."""

    def __init__(self, rows: int, width: int, *, momentum: float = 0.99) -> None:
        self.momentum = momentum
        self.count = torch.zeros(rows, 1)
        self.mean = torch.zeros(rows, width)
        self.square = torch.zeros(rows, width)

    def update(self, values: Tensor, present: Tensor) -> None:
        """Take in values [B, rows, D] where present [B, rows]; rows nobody has stay as they were."""
        weight = present[..., None].to(values.dtype)
        num = weight.sum(dim=0)
        here = num > 0
        self.count = self.count + here
        rate = torch.where(here, (1.0 / self.count.clamp_min(1)).clamp_min(1.0 - self.momentum), 0.0)
        num = num.clamp_min(1)
        self.mean = self.mean + rate * ((values * weight).sum(dim=0) / num - self.mean)
        self.square = self.square + rate * ((values.square() * weight).sum(dim=0) / num - self.square)

    def standardise(self, values: Tensor) -> Tensor:
        """Values [B, rows, D] in units of their row's standard deviation."""
        deviation = (self.square - self.mean.square()).clamp_min(0.0).sqrt()
        return (values - self.mean) / (deviation + 1e-2)

    def tensors(self) -> dict[str, Tensor]:
        """The state, by name."""
        return {"count": self.count, "mean": self.mean, "square": self.square}


class LatentObjective:
    """Regression of teacher features, per subject; nothing couples subjects but the running statistics."""

    needs_teacher = True

    def __init__(self, config: LatentConfig, model: PanModel) -> None:
        self.config = config
        self.places = RunningMoments(len(model.stream_of_place), model.width)
        self.summaries = RunningMoments(len(model.stream_names), model.width)

    def loss(self, student: PanModel, teacher: PanModel, view: View, full: Encoded | None) -> Tensor:
        """Loss of each subject [B]."""
        assert full is not None
        targets, summaries, present = self._targets(student, full)
        wanted = gather_tokens(targets, view.hidden_column)
        tokens = mean_over(self._distance(view.guesses, wanted), view.hidden.valid)
        summary = mean_over(self._distance(student.heads.summarise(view.seen.cls), summaries), present)
        return tokens + self.config.summary_weight * summary

    @torch.no_grad()
    def _targets(self, student: PanModel, full: Encoded) -> tuple[Tensor, Tensor, Tensor]:
        """Targets of all places [B, N, D], of all streams [B, S, D], and which streams are present [B, S]."""
        blocks = full.blocks[-self.config.top_blocks :]
        targets = torch.stack([functional.layer_norm(block.float(), block.shape[-1:]) for block in blocks]).mean(0)
        if self.config.standardise:
            targets = self._standardise_places(targets, full.layout)
        summaries, present = _stream_means(targets, full.layout, student)
        if self.config.standardise:
            self.summaries.update(summaries, present)
            summaries = self.summaries.standardise(summaries)
        return targets, summaries, present

    def _standardise_places(self, targets: Tensor, layout: Layout) -> Tensor:
        """Standardise in the vocabulary's own order, where every place has its row."""
        rows = targets.new_zeros(len(targets), len(self.places.count) + 1, targets.shape[-1])
        column = layout.place.masked_fill(~layout.valid, len(self.places.count))
        index = column[..., None].expand_as(targets)
        rows = rows.scatter(1, index, targets)[:, :-1]
        present = torch.zeros(rows.shape[0], rows.shape[1] + 1, dtype=torch.bool, device=rows.device)
        present = present.scatter(1, column, layout.valid)[:, :-1]
        self.places.update(rows, present)
        return gather_tokens(self.places.standardise(rows), layout.place)

    def _distance(self, guess: Tensor, target: Tensor) -> Tensor:
        return functional.smooth_l1_loss(guess.float(), target, beta=self.config.beta, reduction="none").mean(dim=-1)

    def state(self) -> dict[str, Tensor]:
        """Running statistics, by name."""
        parts = {"places": self.places, "summaries": self.summaries}
        return {f"{part}.{name}": value for part, moments in parts.items() for name, value in moments.tensors().items()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take back what `state` gave."""
        for part, moments in {"places": self.places, "summaries": self.summaries}.items():
            for name in moments.tensors():
                setattr(moments, name, state[f"{part}.{name}"].clone())


def _stream_means(targets: Tensor, layout: Layout, model: PanModel) -> tuple[Tensor, Tensor]:
    """Mean target of each stream [B, S, D] and which streams are present [B, S]."""
    batch, _, width = targets.shape
    stream = model.stream_of_place[layout.place]
    weight = layout.valid.to(targets.dtype)
    count = targets.new_zeros(batch, len(model.stream_names)).scatter_add_(1, stream, weight)
    total = targets.new_zeros(batch, len(model.stream_names), width)
    total.scatter_add_(1, stream[..., None].expand_as(targets), targets * weight[..., None])
    return total / count.clamp_min(1)[..., None], count > 0
