"""Latent self-distillation: regress the teacher's features of the hidden tokens.

    target   y = sqrt(1 - a) standardise(mean over the last blocks of LayerNorm(teacher block output))
                 + sqrt(a) standardise(R patch features),   a = content-share, R a fixed random projection
    tokens   mean over hidden patches of SmoothL1(prediction - y)
    summary  mean over the subject's streams of SmoothL1(summary predicted from CLS - mean of y over the stream)
    loss     tokens + summary-weight x summary

Targets are standardised per patch and feature by running statistics: what is the same for everybody (which organ is
there) then carries no reward, only what differs between patients does.

The content term is the same in every run of one seed and cannot collapse: without it the teacher drifts within a
thousand steps to the few features that are easy to predict (effective rank 3 of 48, simulations/studies/LOG.md).

Source: data2vec (Baevski et al. 2022) for targets; the random projection follows BEST-RQ (Chiu et al. 2022); the CLS
summary and the standardisation are this project's.
Shape legend: B subjects, P subjects that hold a stream, N patches, M patches in the vocabulary, S streams, T tokens of
a stream, F patch features of a token, D width.
"""

import torch
from torch import Tensor
from torch.nn import functional

from panfm.data.store import Batch, send
from panfm.models import PanModel
from panfm.models.backbone import Encoded
from panfm.models.batch_sums import batch_sum
from panfm.models.patch_features import num_patch_features, patch_step, patchify
from panfm.models.tokens import Layout, gather_tokens
from panfm.seeds import torch_generator
from panfm.training.objectives.interface import Objective, StudentOutput, Targets, mean_over
from panfm.training.objectives.latent.config import LatentConfig
from panfm.training.token_mask import TokenMask

_MOMENTUM = 0.99
"""Of the running moments, per step."""


class RunningMoments:
    """Mean and variance per row and feature, by exponential averages that start as plain averages."""

    def __init__(self, rows: int, width: int, *, device: torch.device | None = None) -> None:
        self.count = torch.zeros(rows, 1, device=device)
        self.mean = torch.zeros(rows, width, device=device)
        self.square = torch.zeros(rows, width, device=device)

    def update(self, values: Tensor, present: Tensor) -> None:
        """Update with values [B, rows, D] where present [B, rows]; rows that no subject has stay as they were."""
        weight = present[..., None].to(values.dtype)
        num = batch_sum(weight.sum(dim=0))
        here = num > 0
        self.count = self.count + here
        rate = torch.where(here, (1.0 / self.count.clamp_min(1)).clamp_min(1.0 - _MOMENTUM), 0.0)
        num = num.clamp_min(1)
        self.mean = self.mean + rate * (batch_sum((values * weight).sum(dim=0)) / num - self.mean)
        self.square = self.square + rate * (batch_sum((values.square() * weight).sum(dim=0)) / num - self.square)

    def standardise(self, values: Tensor) -> Tensor:
        """Values [B, rows, D] in units of their row's standard deviation."""
        deviation = (self.square - self.mean.square()).clamp_min(0.0).sqrt()
        return (values - self.mean) / (deviation + 1e-2)

    def tensors(self) -> dict[str, Tensor]:
        """The state, by name."""
        return {"count": self.count, "mean": self.mean, "square": self.square}


class LatentObjective(Objective):
    """Regression of teacher features, per subject; nothing couples subjects but the running statistics."""

    spreads = True

    def __init__(self, config: LatentConfig, model: PanModel, seed: int) -> None:
        self.config = config
        self.needs_teacher = config.content_share < 1.0
        num_patches, device = len(model.stream_of_patch), model.stream_of_patch.device
        self.patches = RunningMoments(num_patches, model.width, device=device)
        self.contents = RunningMoments(num_patches, model.width, device=device)
        self.summaries = RunningMoments(len(model.stream_names), model.width, device=device)
        self.projections = {name: _projection(model, name, seed) for name in model.stream_names}

    @torch.no_grad()
    def targets(self, teacher: PanModel, features: Batch, mask: TokenMask, full: Encoded | None) -> Targets:
        """Features of the hidden patches [B, K, D], summaries of streams [B, S, D], which streams are there [B, S]."""
        tokens, summaries, present = self._features(teacher, mask.layout, full, features)
        return {"patches": gather_tokens(tokens, mask.hidden_column), "summaries": summaries, "present": present}

    def loss(self, student: PanModel, output: StudentOutput, targets: Targets) -> Tensor:
        """Loss of each subject [B]."""
        tokens = mean_over(self._distance(output.predictions, targets["patches"]), output.mask.hidden.valid)
        summaries = student.heads.summarise(output.encoded.cls)
        summary = mean_over(self._distance(summaries, targets["summaries"]), targets["present"])
        return tokens + self.config.summary_weight * summary

    def _features(
        self, model: PanModel, layout: Layout, full: Encoded | None, features: Batch
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Targets of all patches [B, N, D], of all streams [B, S, D], and which streams are present [B, S]."""
        share = self.config.content_share
        targets = self._standardised(self.contents, self._contents(model, features, layout), layout)
        if self.needs_teacher:
            assert full is not None
            blocks = full.blocks[-self.config.top_blocks :]
            taught = torch.stack([functional.layer_norm(block.float(), block.shape[-1:]) for block in blocks]).mean(0)
            taught = self._standardised(self.patches, taught, layout)
            targets = (1.0 - share) ** 0.5 * taught + share**0.5 * targets
        summaries, present = _stream_means(targets, layout, model)
        if self.config.standardise:
            self.summaries.update(summaries, present)
            summaries = self.summaries.standardise(summaries)
        return targets, summaries, present

    def _standardised(self, moments: RunningMoments, targets: Tensor, layout: Layout) -> Tensor:
        return _standardise_patches(moments, targets, layout) if self.config.standardise else targets

    def _contents(self, model: PanModel, features: Batch, layout: Layout) -> Tensor:
        """Projected patch features [B, N, D]."""
        contents = torch.zeros(features.size, len(model.stream_of_patch), model.width, device=layout.patch_index.device)
        for name in model.stream_names:
            if name in features.images:
                patches = patchify(features.images[name], patch_step(model.stream_configs[name], model.tokenizer))
                rows = send(features.rows[name], contents.device)
                contents[rows, model.patches_of[name]] = (patches @ self.projections[name]).float()
        return gather_tokens(contents, layout.patch_index)

    def _distance(self, prediction: Tensor, target: Tensor) -> Tensor:
        return functional.smooth_l1_loss(prediction.float(), target, beta=self.config.beta, reduction="none").mean(
            dim=-1
        )

    def state(self) -> dict[str, Tensor]:
        """Running statistics, by name."""
        return {
            f"{part}.{name}": value
            for part, moments in self._moments().items()
            for name, value in moments.tensors().items()
        }

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Restore what `state` returned."""
        for part, moments in self._moments().items():
            for name in moments.tensors():
                setattr(moments, name, state[f"{part}.{name}"].to(moments.count.device, copy=True))

    def _moments(self) -> dict[str, RunningMoments]:
        return {"patches": self.patches, "contents": self.contents, "summaries": self.summaries}


def _standardise_patches(moments: RunningMoments, targets: Tensor, layout: Layout) -> Tensor:
    """Standardise targets [B, N, D] in the vocabulary's own order, where every patch has its row."""
    num_patches = len(moments.count)
    rows = targets.new_zeros(len(targets), num_patches + 1, targets.shape[-1])
    column = layout.patch_index.masked_fill(~layout.valid, num_patches)
    rows = rows.scatter(1, column[..., None].expand_as(targets), targets)[:, :-1]
    present = torch.zeros(rows.shape[0], num_patches + 1, dtype=torch.bool, device=rows.device)
    moments.update(rows, present.scatter(1, column, layout.valid)[:, :-1])
    return gather_tokens(moments.standardise(rows), layout.patch_index)


def _projection(model: PanModel, name: str, seed: int) -> Tensor:
    """Fixed random projection [F, D] of one stream's patch features; depends on the run's seed and the name alone."""
    features = num_patch_features(model.stream_configs[name], model.tokenizer)
    projection = torch.randn(features, model.width, generator=torch_generator(seed, "content", name))
    return (projection / features**0.5).to(model.stream_of_patch.device)


def _stream_means(targets: Tensor, layout: Layout, model: PanModel) -> tuple[Tensor, Tensor]:
    """Mean target of each stream [B, S, D] and which streams are present [B, S]."""
    batch, _, width = targets.shape
    stream = model.stream_of_patch[layout.patch_index]
    weight = layout.valid.to(targets.dtype)
    count = targets.new_zeros(batch, len(model.stream_names)).scatter_add_(1, stream, weight)
    total = targets.new_zeros(batch, len(model.stream_names), width)
    total.scatter_add_(1, stream[..., None].expand_as(targets), targets * weight[..., None])
    return total / count.clamp_min(1)[..., None], count > 0
