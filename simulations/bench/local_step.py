"""Cost of a training step: one of ours over a plain dense one, and over its matrix products alone.

    masked    the trainer's step: a teacher that sees all tokens, a student that computes the visible ones alone, a
              predictor of the hidden ones; latent self-distillation, random masks
    dense     the same method as one writes it first, with torch's own transformer layers: hidden tokens are a learned
              vector and go through the student like the others; teacher, loss, clipping, AdamW and teacher's update
              as in `masked`, but no predictor, and targets are not standardised
    products  the matrix products of `masked`, forward and backward, on operands of the same shapes and strides that lie
              ready, into results that do; those of attention as products of matrices

A step is of 16 subjects that hold seven organs of 27 tokens each, three fifths of them hidden; 12 blocks, 192 wide, one
thread. The arms take turns, step by step, in one process; a ratio is the median over the turns, in CPU time.
"""

import time
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from panfm.anatomy import DEFAULT_ORGANS
from panfm.config import RunConfig, parse_run
from panfm.data.store import ImageStore
from panfm.models.pan import SIZES
from panfm.models.patch_features import num_patch_features, patch_step, patchify
from panfm.seeds import torch_generator
from panfm.training.objectives.latent.config import LatentConfig
from panfm.training.trainer import Trainer
from simulations.bench._steps import in_turns, noise_store, step_seconds
from simulations.harness import bench
from simulations.study_result import StudyResult

_STREAM = "{ spacing-mm = [8.0, 8.0, 8.0], shape = [24, 24, 24], patch = [8, 8, 8] }"
_RUN = """
name = "local-step"
model.size = "{size}"
masking = {{ policy = "random", ratio = 0.6 }}
train = {{ rounds = 1, local-steps = {steps}, batch-size = {subjects} }}
"""


@bench
def main(
    turns: Annotated[int, typer.Option(min=1, help="Steps per arm, after one to warm up.")] = 9,
    subjects: Annotated[int, typer.Option(min=2, help="Subjects per step.")] = 16,
) -> StudyResult:
    """CPU seconds of a training step over a dense one and over its matrix products."""
    torch.set_num_threads(1)
    console = Console(soft_wrap=True, highlight=False)
    run = description("tiny", turns, subjects)
    result = StudyResult("local-step", {"turns": turns, "subjects": subjects, "size": "tiny"}, unit="s")
    for arm, values in measure(run, turns).items():
        result.values["step", arm] = values
    for other in ("dense", "products"):
        ratio = "over_matmul" if other == "products" else "over_dense"
        result.ratios[ratio] = result.median_ratio("step", "masked", other)
        console.print(f"masked over {other}: {result.ratios[ratio]:.3f}")
    return result


def description(size: str, turns: int, subjects: int) -> RunConfig:
    """The run that is measured: seven organs in MR, a batch of all subjects."""
    streams = "".join(f"streams.{organ}-mr = {_STREAM}\n" for organ in DEFAULT_ORGANS)
    return parse_run(_RUN.format(size=size, steps=turns + 1, subjects=subjects) + streams)


def measure(run: RunConfig, turns: int) -> dict[str, list[float]]:
    """CPU seconds of `turns` steps of every arm, in turn order."""
    store = noise_store(run.streams, run.seed, run.train.batch_size, "local-step")
    masked = Trainer(run)
    dense, products = PlainDense(run, masked.patch_features(store)), Products.of_step(Trainer(run), store)
    arms: dict[str, Callable[[int], float]] = {
        "masked": partial(step_seconds, masked, store),
        "dense": dense.take_step,
        "products": products.take_step,
    }
    return in_turns(arms, turns)


class PlainTransformer(nn.Module):
    """A ViT over the tokens of all streams, in which a hidden token is a learned vector."""

    def __init__(self, run: RunConfig) -> None:
        super().__init__()
        width, depth, heads = SIZES[run.model.size]
        features = [num_patch_features(stream, run.model.tokenizer) for stream in run.streams.values()]
        tokens = sum(torch.Size(stream.grid).numel() for stream in run.streams.values())
        self.project = nn.ModuleList(nn.Linear(size, width) for size in features)
        self.cls, self.hidden = (nn.Parameter(torch.zeros(width)) for _ in range(2))
        self.position = nn.Parameter(torch.zeros(tokens, width))
        layer = partial(nn.TransformerEncoderLayer, dropout=0.0, activation="gelu", batch_first=True, norm_first=True)
        self.blocks = nn.ModuleList(layer(width, heads, run.model.hidden_multiple * width) for _ in range(depth))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width))

    def forward(self, patches: list[Tensor], hidden: Tensor | None = None) -> list[Tensor]:
        """Outputs [B, 1 + N, D] of every block, for patches [B, T, F] of every stream; `hidden` is bool [B, N]."""
        x = torch.cat([project(part) for project, part in zip(self.project, patches, strict=True)], dim=1)
        if hidden is not None:
            x = torch.where(hidden[:, :, None], self.hidden, x)
        x = torch.cat([self.cls.expand(len(x), 1, -1), x + self.position], dim=1)
        outputs = []
        for block in self.blocks:
            x = block(x)
            outputs.append(x)
        return outputs


class PlainDense:
    """Masked self-distillation that computes all tokens."""

    def __init__(self, run: RunConfig, features: ImageStore) -> None:
        self.run = run
        self.student = PlainTransformer(run)
        self.teacher = deepcopy(self.student).requires_grad_(requires_grad=False)
        self.optimiser = torch.optim.AdamW(self.student.parameters(), lr=run.train.learning_rate, fused=True)
        steps = {name: patch_step(stream, run.model.tokenizer) for name, stream in run.streams.items()}
        self.patches = [patchify(torch.from_numpy(features.images[name]), step) for name, step in steps.items()]
        assert isinstance(run.objective, LatentConfig)
        self.top_blocks = run.objective.top_blocks
        self.masks = torch_generator(run.seed, "dense-masks")

    def take_step(self, _: int = 0) -> float:
        """CPU seconds of one step."""
        begin = time.process_time()
        keys = torch.rand(len(self.patches[0]), len(self.student.position), generator=self.masks)
        hidden = keys.argsort(dim=1).argsort(dim=1) < round(self.run.masking.ratio * keys.shape[1])
        with torch.no_grad():
            blocks = self.teacher(self.patches)[-self.top_blocks :]
            target = torch.stack([functional.layer_norm(block, block.shape[-1:]) for block in blocks]).mean(dim=0)
        predicted = self.student.head(self.student(self.patches, hidden)[-1])
        distance = functional.smooth_l1_loss(predicted[:, 1:], target[:, 1:], reduction="none").mean(dim=-1)
        loss = distance[hidden].mean()
        self.optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.student.parameters(), self.run.train.clip_norm)
        self.optimiser.step()
        with torch.no_grad():
            for old, new in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
                old.lerp_(new, 0.004)
        return time.process_time() - begin


Operand = tuple[tuple[int, ...], tuple[int, ...]]
"""Size and strides of a matrix, or of a stack of them."""


class Products(TorchDispatchMode):
    """Notes the matrix products of what runs under it, and repeats them."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.pairs: list[tuple[Operand, Operand]] = []
        self.operands: dict[Operand, Tensor] = {}
        self.results: dict[tuple[int, ...], Tensor] = {}

    @classmethod
    def of_step(cls, trainer: Trainer, store: ImageStore) -> "Products":
        """The products of one step of a trainer."""
        products = cls()
        trainer.patch_features(store)
        with products:
            step_seconds(trainer, store, at_end=products.stop)
        return products

    def stop(self) -> None:
        """Take no more notes, and make room for operands and results."""
        for shape, strides in {operand for pair in self.pairs for operand in pair}:
            size = 1 + sum((edge - 1) * stride for edge, stride in zip(shape, strides, strict=True))
            self.operands[shape, strides] = torch.rand(size).as_strided(shape, strides)
        for first, second in self.pairs:
            shape = (*first[0][:-1], second[0][-1])
            self.results.setdefault(shape, torch.empty(shape))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note the products of an operation, and do it."""
        name = func.overloadpacket.__name__
        if self.operands:
            pass
        elif name in ("mm", "bmm"):
            self._note(*args[:2])
        elif name in ("addmm", "baddbmm"):
            self._note(*args[1:3])
        elif name == "_scaled_dot_product_flash_attention_for_cpu":
            q, k, v = (part.flatten(0, 1) for part in args[:3])
            shares = q @ k.mT
            self._note(q, k.mT)
            self._note(shares, v)
        elif name == "_scaled_dot_product_flash_attention_for_cpu_backward":
            up, q, k, v = (part.flatten(0, 1) for part in args[:4])
            shares = q @ k.mT
            for first, second in ((up, v.mT), (shares.mT, up), (shares, k), (shares.mT, q)):
                self._note(first, second)
        return func(*args, **(kwargs or {}))

    def take_step(self, _: int = 0) -> float:
        """CPU seconds of all products, one after the other."""
        begin = time.process_time()
        for first, second in self.pairs:
            result = self.results[*first[0][:-1], second[0][-1]]
            torch.matmul(self.operands[first], self.operands[second], out=result)
        return time.process_time() - begin

    def _note(self, first: Tensor, second: Tensor) -> None:
        self.pairs.append((((*first.shape,), first.stride()), ((*second.shape,), second.stride())))
