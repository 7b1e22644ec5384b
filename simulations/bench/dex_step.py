"""Cost of a Director-Experts backbone: one MAE step with it over one with a dense backbone.

    dense   one MLP per block, hidden width 4 x 192
    dex     8 experts and a director per block, 2 active, hidden width 2 x 192: the same active FLOPs
    naive   dex as one writes it first: a loop over expert modules that autograd differentiates, torch's cosine, and a
            director that stacks all experts every step

A step is forward, losses, backward, optimiser and the directors' update on 32 images of 196 tokens, three quarters of
them hidden, 12 blocks, one thread. The routers' noise stays at 1, so that experts stay in use. The arms take turns,
step by step, in one process and on the same batches; a ratio is the median over the turns, in CPU time.
"""

from functools import partial
from typing import Annotated

import torch
import typer
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional

from panfm.config import RunConfig, parse_run
from panfm.models.backbone import Routed
from panfm.models.director_experts import Alignment, DirectorExperts, DirectorExpertsBackbone
from panfm.models.vit import Mlp
from panfm.registry import BACKBONES
from panfm.sharing.groups import EXPERTS
from panfm.training.trainer import Trainer
from simulations.bench._steps import in_turns, noise_store, step_seconds
from simulations.harness import bench
from simulations.study_result import StudyResult

_RUN = """
name = "dex-step"
streams.chest-xray = { shape = [224, 224], patch = [16, 16] }
objective.name = "mae"
masking = { policy = "random", ratio = 0.75 }
train.rounds = 1
"""
_MODELS = {
    "dense": 'model = { size = "tiny", tokenizer = "patch" }',
    "dex": 'model = { size = "tiny", tokenizer = "patch", backbone = "director-experts", hidden-multiple = 2, '
    "experts = { noise = [1.0, 1.0] } }",
}
_BATCH = 32


@bench
def main(
    turns: Annotated[int, typer.Option(min=1, help="Steps per arm, after one to warm up.")] = 15,
    shrink: Annotated[int, typer.Option(min=1, max=16, help="Divide the number of images by this.")] = 1,
) -> StudyResult:
    """CPU seconds of a Director-Experts step over a dense and over a naive one."""
    torch.set_num_threads(1)
    console = Console(soft_wrap=True, highlight=False)
    batch = _BATCH // shrink
    result = StudyResult("dex-step", {"turns": turns, "batch": batch, "run": _RUN, "models": _MODELS}, unit="s")
    for arm, values in measure(turns, batch).items():
        result.values["step", arm] = values
    for other in ("dense", "naive"):
        result.ratios[f"dex_over_{other}"] = result.median_ratio("step", "dex", other)
        console.print(f"dex over {other}: {result.ratios[f'dex_over_{other}']:.3f}")
    return result


def measure(turns: int, batch: int) -> dict[str, list[float]]:
    """CPU seconds of `turns` steps of every arm, in turn order."""
    trainers = {arm: Trainer(_run(arm, turns, batch)) for arm in _MODELS}
    trainers["naive"] = Trainer(naive_run(_run("dex", turns, batch)))
    run = trainers["dense"].run
    store = noise_store(run.streams, run.seed, 2 * batch, "dex-step")
    return in_turns({arm: partial(step_seconds, trainer, store) for arm, trainer in trainers.items()}, turns)


class NaiveExperts(nn.Module):
    """One module per expert; an expert picks its subjects and adds its outputs for them."""

    sharing_group = EXPERTS

    def __init__(self, num_experts: int, width: int, hidden: int) -> None:
        super().__init__()
        self.experts = nn.ModuleList(Mlp(width, hidden) for _ in range(num_experts))

    def forward(self, x: Tensor, chosen: Tensor, gates: Tensor) -> Tensor:
        """Mix the chosen experts' outputs for x [B, L, D]."""
        mixed = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            subject, rank = torch.nonzero(chosen == index, as_tuple=True)
            if len(subject):
                mixed = mixed.index_add(0, subject, gates[subject, rank, None, None] * expert(x[subject]))
        return mixed


class NaiveDirectorExperts(DirectorExperts):
    """Stacks all experts whenever the director moves; its cosine is torch's."""

    experts: NaiveExperts  # type: ignore[assignment]

    def make_experts(self, num_experts: int, width: int, hidden: int) -> NaiveExperts:  # type: ignore[override]
        """Make one module per expert."""
        return NaiveExperts(num_experts, width, hidden)

    def start_experts(self) -> None:
        """Make every expert a copy of the director."""
        for expert in self.experts.experts:
            expert.load_state_dict(self.director.state_dict())

    def alignment_loss(self, routed: Routed, valid: Tensor, kind: Alignment) -> Tensor:
        """One minus torch's cosine similarity, for the one kind that the bench asks for."""
        assert kind == "cosine"
        with torch.no_grad():
            target = self.director(routed.inputs)
        distance = 1.0 - functional.cosine_similarity(routed.outputs, target, dim=-1)
        return (distance * valid).sum(dim=1) / valid.sum(dim=1)

    @torch.no_grad()
    def move_director(self, mass: Tensor, *, momentum: float) -> None:
        """Group EMA over a stack of every parameter."""
        share = mass / mass.sum()
        parameters = [list(expert.parameters()) for expert in self.experts.experts]
        for director, same in zip(self.director.parameters(), zip(*parameters, strict=True), strict=True):
            group = (torch.stack(same) * share.view(-1, *[1] * director.dim())).sum(dim=0)
            director.copy_(momentum * director + (1.0 - momentum) * group)


class NaiveBackbone(DirectorExpertsBackbone):
    """Director-Experts with naive layers."""

    layer_class = NaiveDirectorExperts


BACKBONES.register("naive-director-experts", NaiveBackbone)


def naive_run(run: RunConfig) -> RunConfig:
    """The same run with naive layers; pooled, because names differ."""
    changed = {
        "model": run.model.model_copy(update={"backbone": "naive-director-experts"}),
        "sharing": run.sharing.model_copy(update={"experts": "pooled"}),
    }
    return run.model_copy(update=changed)


def _run(arm: str, turns: int, batch: int) -> RunConfig:
    return parse_run(f"{_MODELS[arm]}\n{_RUN}train.batch-size = {batch}\ntrain.local-steps = {turns + 1}\n")
