"""Speed of a training step on a GPU: patients a second and share of the device's matrix rate, beside plain layers.

    ours       the trainer's step: a teacher that sees all tokens, a student that computes the visible ones, a predictor
    compiled   `ours`, its blocks compiled by torch with sizes that may change
    plain      torch's own transformer layers with a teacher over as many tokens and a student over as many visible
               ones, without padding, predictor, masks and heads; `plain-compiled` with its blocks compiled
    experts    `ours` with a Director-Experts backbone
    workers    `ours` with four threads that prepare batches: faster than `ours` if that waits for its input
    two-sites  `ours` in two processes on the one device, patients of both together

`picture` is one stream of 196 tokens; `volumes` are eight organs of 125 tokens, of which a patient lacks each with a
probability of a third. Three fifths of the tokens are hidden. The share of the matrix rate counts the products of a
step and divides by the rate of one large bf16 product on the same device. An arm that fails, for want of memory for
example, is told and left out, and so are those that do not begin within `--minutes`.
"""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from copy import deepcopy
from functools import partial
from multiprocessing import get_context
from typing import Annotated, Any, cast

import numpy as np
import torch
import typer
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from panfm.anatomy import DEFAULT_ORGANS
from panfm.config import RunConfig, parse_run
from panfm.data.store import ImageStore
from panfm.models.pan import SIZES
from panfm.seeds import numpy_generator
from panfm.training.trainer import Trainer
from simulations.harness import bench
from simulations.study_result import StudyResult

SHAPES = ("picture", "volumes")
MODELS = ("tiny", "small", "base")
COMPILER = "inductor"
_HIDDEN, _LACKED = 0.6, 1 / 3
_VOLUME = "{ spacing-mm = [4.0, 4.0, 4.0], shape = [40, 40, 40], patch = [8, 8, 8] }"
_PICTURE = "{ shape = [224, 224], patch = [16, 16] }"
_EXPERTS = 'backbone = "director-experts", hidden-multiple = 2, '

Steps = Callable[[int], Any]
"""Takes a number of steps."""


@bench
def main(
    steps: Annotated[int, typer.Option(min=1, help="Steps per arm, after three to warm up.")] = 20,
    subjects: Annotated[int, typer.Option(min=8, help="Patients per step; a quarter of them for volumes.")] = 128,
    minutes: Annotated[float, typer.Option(min=0.0, help="Begin no arm after this.")] = 8.0,
) -> StudyResult:
    """Patients a second of training steps on a GPU, and their share of its matrix rate."""
    result = StudyResult("gpu", {"steps": steps, "subjects": subjects, "minutes": minutes}, unit="samples/s")
    console = Console(soft_wrap=True, highlight=False)
    if not torch.cuda.is_available():
        console.print("bench gpu: skipped, PyTorch shows no GPU")
        return result
    result.config["device"] = torch.cuda.get_device_name()
    measure(result, console, MODELS, steps, subjects, time.monotonic() + 60.0 * minutes)
    return result


def measure(
    result: StudyResult, console: Console, models: tuple[str, ...], steps: int, subjects: int, end: float
) -> None:
    """Add samples/s of every arm, and its ratios, to a result; begins no arm after `end` of the monotonic clock."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    peak = matrix_rate(device, 8192 if device.type == "cuda" else 256)
    for name, batch, make in arms(models, steps, subjects, device):
        if time.monotonic() > end:
            console.print(f"{name}: left out, no time left")
            continue
        try:
            rate, operations = make()
        except RuntimeError as error:  # out of memory, or what torch's compiler cannot do
            console.print(f"{name}: failed, {type(error).__name__}", markup=False)
            continue
        result.values["step", name] = [rate]
        if operations:
            result.ratios[f"share_of_matrix_rate/{name}"] = operations / batch * rate / peak
        if (plain := result.values.get(("step", f"{name.rpartition('/')[0]}/plain-compiled"))) is not None:
            result.ratios[f"over_plain_compiled/{name}"] = rate / plain[0]
        console.print(f"{name}: {rate:.0f} samples/s")


Arm = tuple[str, int, Callable[[], tuple[float, float]]]
"""Name, patients per step, and what measures samples/s and operations per step (0 where they are not counted)."""


def arms(models: tuple[str, ...], steps: int, subjects: int, device: torch.device) -> Iterator[Arm]:
    """Yield the arms, those first that tell most."""
    places = [(shape, size, subjects if shape == "picture" else subjects // 4) for size in models for shape in SHAPES]
    for shape, size, batch in places:
        run = partial(description, shape, size, steps, batch)
        plain = partial(_plain, shape, size, batch, steps, device)
        yield f"{shape}/{size}/plain-compiled", batch, partial(plain, compiles=True)
        yield f"{shape}/{size}/ours", batch, partial(_ours, run(), steps)
        yield f"{shape}/{size}/experts", batch, partial(_ours, run(experts=True), steps)
        yield f"{shape}/{size}/plain", batch, plain
    for shape, size, batch in places:
        run = partial(description, shape, size, steps, batch)
        yield f"{shape}/{size}/compiled", batch, partial(_ours, run(), steps, compiles=True)
        yield f"{shape}/{size}/workers", batch, partial(_ours, run(), steps, workers=4)
    shape, size, batch = places[0]
    yield f"{shape}/{size}/two-sites", batch, partial(_two_sites, description(shape, size, steps, batch), steps)


def description(shape: str, size: str, steps: int, batch: int, *, experts: bool = False) -> RunConfig:
    """The run of an arm; a batch is of all subjects."""
    streams = {"chest-xray": _PICTURE} if shape == "picture" else {f"{organ}-mr": _VOLUME for organ in _organs()}
    model = f'model = {{ {_EXPERTS if experts else ""}size = "{size}", tokenizer = "patch" }}\n'
    train = f"train = {{ rounds = 1, local-steps = {steps}, batch-size = {batch} }}\n"
    masks = f'masking = {{ policy = "random", ratio = {_HIDDEN} }}\n'
    return parse_run(
        f'name = "gpu"\n{model}{train}{masks}' + "".join(f"streams.{n} = {t}\n" for n, t in streams.items())
    )


def _organs() -> tuple[str, ...]:
    return (*DEFAULT_ORGANS, "prostate")[:8]


def incomplete_store(run: RunConfig) -> ImageStore:
    """A batch of subjects whose images are noise; of several streams, each subject lacks some."""
    random, size = numpy_generator(run.seed, "gpu"), run.train.batch_size
    holds = random.random((size, len(run.streams))) >= (_LACKED if len(run.streams) > 1 else 0.0)
    holds[np.arange(size), np.arange(size) % len(run.streams)] = True
    rows = {name: np.flatnonzero(holds[:, place]) for place, name in enumerate(run.streams)}
    images = {
        name: random.random((len(rows[name]), stream.channels, *stream.shape), dtype=np.float32)
        for name, stream in run.streams.items()
    }
    return ImageStore(tuple(map(str, range(size))), ("train",) * size, images, rows)


def _ours(run: RunConfig, steps: int, *, workers: int = 0, compiles: bool = False) -> tuple[float, float]:
    trainer, store = Trainer(run), incomplete_store(run)
    if compiles:
        for model in (trainer.model, trainer.teacher):
            for block in cast(nn.ModuleList, model.backbone.blocks):
                block.compile(dynamic=True, backend=COMPILER)
    everyone, words = np.arange(run.train.batch_size), {"site": "bench", "round_number": 1, "workers": workers}

    def take_steps(number: int) -> None:
        trainer.train(store, everyone, first_step=0, num_steps=number, **words)  # type: ignore[arg-type]

    return _measured(take_steps, run.train.batch_size, steps, trainer.device, counts=not compiles)


def _two_sites(run: RunConfig, steps: int) -> tuple[float, float]:
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        return sum(rate for rate, _ in pool.map(_ours, [run] * 2, [steps] * 2)), 0.0


def _plain(
    shape: str, size: str, batch: int, steps: int, device: torch.device, *, compiles: bool = False
) -> tuple[float, float]:
    tokens = 196 if shape == "picture" else round(1000 * (1 - _LACKED))
    plain = PlainLayers(size, batch, tokens, device)
    if compiles:
        for block in (*plain.student, *plain.teacher):
            block.compile(backend=COMPILER)
    return _measured(plain.take_steps, batch, steps, device, counts=not compiles)


class PlainLayers:
    """Self-distillation by torch's transformer layers on tokens that lie ready."""

    def __init__(self, size: str, batch: int, tokens: int, device: torch.device) -> None:
        width, depth, heads = SIZES[size]
        layer = partial(nn.TransformerEncoderLayer, dropout=0.0, activation="gelu", batch_first=True, norm_first=True)
        self.student = nn.Sequential(*(layer(width, heads, 4 * width) for _ in range(depth))).to(device)
        self.teacher = deepcopy(self.student).requires_grad_(requires_grad=False)
        self.optimiser = torch.optim.AdamW(self.student.parameters(), fused=True)
        self.tokens = torch.randn(batch, 1 + tokens, width, device=device)
        self.num_visible = 1 + round(tokens * (1 - _HIDDEN))

    def take_steps(self, number: int) -> None:
        """Take some steps."""
        for _ in range(number):
            with torch.autocast(self.tokens.device.type, torch.bfloat16, enabled=self.tokens.is_cuda):
                with torch.no_grad():
                    target: Tensor = self.teacher(self.tokens)[:, : self.num_visible]
                loss = functional.smooth_l1_loss(self.student(self.tokens[:, : self.num_visible]), target)
            self.optimiser.zero_grad()
            loss.backward()
            self.optimiser.step()
            with torch.no_grad():
                ways = torch._foreach_sub(list(self.student.parameters()), list(self.teacher.parameters()))
                torch._foreach_add_(list(self.teacher.parameters()), ways, alpha=0.004)


def _measured(take_steps: Steps, batch: int, steps: int, device: torch.device, *, counts: bool) -> tuple[float, float]:
    """Samples/s of steps, and operations of the products of one if they are to be counted: compiled ones are not."""
    take_steps(3)
    rate = batch * steps / _seconds(partial(take_steps, steps), device)
    return rate, float(operations_of(partial(take_steps, 2)) - operations_of(partial(take_steps, 1))) if counts else 0.0


def operations_of(work: Callable[[], Any]) -> int:
    """Multiplications and additions of the matrix products and attention of some work."""
    grouped = {torch.ops.aten._grouped_mm: _grouped_operations}
    with FlopCounterMode(display=False, custom_mapping=grouped) as counter:
        work()
    return counter.get_total_flops()


def _grouped_operations(first: tuple[int, ...], second: tuple[int, ...], *_: Any, **__: Any) -> int:
    """Of rows [T, D] by weights [R, D, H], or of [D, T] by [T, H] cut along T."""
    return 2 * first[-2] * first[-1] * second[-1]


def matrix_rate(device: torch.device, size: int) -> float:
    """Operations a second of a product of two square bf16 matrices."""
    factor = torch.randn(size, size, device=device, dtype=torch.bfloat16)

    def multiply(number: int) -> None:
        for _ in range(number):
            factor @ factor

    multiply(3)
    return 2.0 * size**3 * 20 / _seconds(partial(multiply, 20), device)


def _seconds(work: Callable[[], Any], device: torch.device) -> float:
    """Seconds until the device has done some work."""
    _wait(device)
    begin = time.perf_counter()
    work()
    _wait(device)
    return time.perf_counter() - begin


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
