"""Cost of the exact, guarded mean at the server: replies of many sites through our strategy and through Flower's.

    ours     GroupedMean: guards, exact order-independent mean on two threads, replies let go one by one
    flower   Flower's FedAvg over the same numbers, one array per parameter as in its examples
    axpy     the floor: `total += weight * update` in numpy, over arrays that lie in memory already, one buffer between

All sites send a `small` model of seven organs (about 23 million numbers). The arms take turns; making the replies is
not counted, nor is compiling. The clock runs from when the first reply is asked for. What ours does before, clearing
the memory that the new model will lie in, a server does while its sites train: it is told apart as `prepared`, and
`prepared_and_ours_over_flower` counts it. Ratios that end in `_cpu` are of CPU seconds, of all threads.
`peak_copies` is what the aggregation had in memory at its worst, replies included and the global model not, in float32
copies of the model; it is taken in a pass of its own.

Where our time goes, on two cores, in ms: of a reply 10 to 13 for its one pass and 8 for letting its bytes go; of a
round 10 for the mean and 9 for the step. Fresh memory costs more than arithmetic here (a copy of the model 50 to 80,
page by page), so there is none: the sum, the mean and the bytes of the message are one piece of memory.
"""

import time
import tracemalloc
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import typer
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg
from rich.console import Console

from panfm.config import RunConfig
from panfm.models import build_model
from panfm.seeds import numpy_generator
from panfm.sharing.groups import Flat, GroupManifest
from panfm.sharing.messages import Handshake, RoundReply
from simulations.bench._steps import Clock
from simulations.cohorts.prepare import load_simulation
from simulations.engines.local import LocalGrid
from simulations.harness import TRANSIENT, Experiment, bench
from simulations.study_result import StudyResult
from strategies import GroupedMean
from strategies.round_messages import make_array

SITES = (4, 16, 64)
_OVER = ("ours_over_flower", "ours_over_axpy", "ours_over_flower_cpu", "ours_over_axpy_cpu")
_RUN_ID, _SUBJECTS, _DISTINCT = "bench", 100, 3


@dataclass(frozen=True)
class Updates:
    """Updates of the sites: a few distinct ones, over and over."""

    run: RunConfig
    manifest: GroupManifest
    named: list[dict[str, Flat]]
    """Parameter -> its part of the update, for each distinct one."""

    @classmethod
    def draw(cls, run: RunConfig) -> "Updates":
        """Updates of a small model, sd 0.01."""
        run = run.model_copy(update={"model": run.model.model_copy(update={"size": "small"})})
        model = build_model(run)
        state = model.state_dict()
        random = numpy_generator(0, "aggregate")
        named = [
            {name: random.normal(0.0, 0.01, tuple(value.shape)).astype(np.float32) for name, value in state.items()}
            for _ in range(_DISTINCT)
        ]
        return cls(run, GroupManifest.of(model.parameter_groups(), state), named)

    @property
    def num_bytes(self) -> int:
        """Bytes of one update."""
        return sum(value.nbytes for value in self.named[0].values())


@bench
def main(
    turns: Annotated[int, typer.Option(min=1, help="Aggregations per arm and number of sites.")] = 3,
    most_sites: Annotated[int, typer.Option(min=SITES[0], help="Leave out larger numbers of sites.")] = SITES[-1],
    experiment: Experiment = TRANSIENT,
) -> StudyResult:
    """Seconds and memory of one aggregation, over Flower's and over the floor."""
    console = Console(soft_wrap=True, highlight=False)
    updates = Updates.draw(load_simulation(experiment))
    result = StudyResult("aggregate", {"turns": turns, "numbers": updates.num_bytes // 4}, unit="s")
    LocalGrid(ClientApp(), 1, {})  # messages want to know which run they are in
    ours(updates, 1)  # compiles
    tried = [num_sites for num_sites in SITES if num_sites <= most_sites]
    for num_sites in tried:
        arms = {"ours": ours, "flower": flower, "axpy": axpy}
        for _ in range(turns):
            for arm, aggregate in arms.items():
                result.add(arm, {f"{num_sites}/{name}": value for name, value in aggregate(updates, num_sites).items()})
        result.ratios[f"{num_sites}/peak_copies"] = peak_bytes(updates, num_sites) / updates.num_bytes
        for other in ("flower", "axpy"):
            for metric, end in (("seconds", ""), ("cpu_seconds", "_cpu")):
                ratio = result.median_ratio(f"{num_sites}/{metric}", "ours", other)
                result.ratios[f"{num_sites}/ours_over_{other}{end}"] = ratio
        result.ratios[f"{num_sites}/prepared_and_ours_over_flower"] = _with_prepared(result, num_sites)
        console.print(f"{num_sites} sites: " + ", ".join(_shown(result.ratios, num_sites)))
    for name in ("peak_copies", "prepared_and_ours_over_flower", *_OVER):
        result.ratios[name] = max(result.ratios[f"{num_sites}/{name}"] for num_sites in tried)
    return result


def _with_prepared(result: StudyResult, num_sites: int) -> float:
    """Median of ours, preparations included, over Flower's."""
    seconds, prepared = (np.array(result.values[f"{num_sites}/{part}", "ours"]) for part in ("seconds", "prepared"))
    return float(np.median((seconds + prepared) / np.array(result.values[f"{num_sites}/seconds", "flower"])))


def _shown(ratios: Mapping[str, float], num_sites: int) -> list[str]:
    start = f"{num_sites}/"
    return [f"{name.removeprefix(start)} {value:.2f}" for name, value in ratios.items() if name.startswith(start)]


class _Replies:
    """Messages of sites, made when they are asked for; the clock runs from then, but for what making them takes."""

    def __init__(self, num_sites: int, content: Callable[[int], RecordDict]) -> None:
        self.asked_for = self._began = self._began_cpu = 0.0
        self._num_sites = num_sites
        self._content = content

    def __iter__(self) -> Iterator[Message]:
        self.asked_for = self._began = time.perf_counter()
        self._began_cpu = time.process_time()
        yield from map(self._make, range(self._num_sites))

    def seconds(self) -> dict[str, float]:
        """Seconds since the first reply was asked for, on the clock and of the CPU."""
        return {
            "seconds": time.perf_counter() - self._began,
            "cpu_seconds": time.process_time() - self._began_cpu,
        }

    def _make(self, site: int) -> Message:
        begin, begin_cpu = time.perf_counter(), time.process_time()
        asked = Message(RecordDict(), site + 2, MessageType.TRAIN)
        reply = Message(self._content(site), reply_to=asked)
        self._began += time.perf_counter() - begin
        self._began_cpu += time.process_time() - begin_cpu
        return reply


def ours(updates: Updates, num_sites: int) -> dict[str, float]:
    """Seconds of one aggregation by our strategy, and of what it prepares."""
    strategy, replies = _our_side(updates, num_sites)
    begin = time.perf_counter()
    strategy.aggregate_train(1, replies)
    seconds = replies.seconds()
    assert len(strategy.outcome.accepted) == num_sites
    return seconds | {"prepared": replies.asked_for - begin}


def peak_bytes(updates: Updates, num_sites: int) -> int:
    """Peak memory of one aggregation by our strategy."""
    strategy, replies = _our_side(updates, num_sites)
    tracemalloc.start()
    strategy.aggregate_train(1, replies)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return peak


def _our_side(updates: Updates, num_sites: int) -> tuple[GroupedMean, _Replies]:
    manifest = updates.manifest
    packed = [manifest.pack_all(named) for named in updates.named]
    subjects = dict.fromkeys(updates.run.streams, _SUBJECTS)
    weights = {group: (float(_SUBJECTS),) for group in manifest.groups}
    roster = {
        site + 2: Handshake(f"site-{site}", _SUBJECTS, subjects, {}, "", manifest.hashes()) for site in range(num_sites)
    }

    def content(site: int) -> RecordDict:
        records = RoundReply(_RUN_ID, 1, 0, packed[site % _DISTINCT], weights).to_records()
        arrays = ArrayRecord({group: make_array(flat) for group, flat in records.arrays.items()})
        metrics, config = MetricRecord(dict(records.metrics)), ConfigRecord(dict(records.config))
        return RecordDict({"arrays": arrays, "metrics": metrics, "config": config})

    strategy = GroupedMean(updates.run, manifest, roster)
    arrays = ArrayRecord({group: Array(flat) for group, flat in packed[0].items()})
    grid = LocalGrid(ClientApp(), num_sites, {})
    list(strategy.configure_train(1, arrays, ConfigRecord({"run-id": _RUN_ID}), grid))
    return strategy, _Replies(num_sites, content)


def flower(updates: Updates, num_sites: int) -> dict[str, float]:
    """Seconds of one aggregation by Flower's FedAvg."""

    def content(site: int) -> RecordDict:
        arrays = ArrayRecord({name: Array(value) for name, value in updates.named[site % _DISTINCT].items()})
        return RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": _SUBJECTS})})

    replies = _Replies(num_sites, content)
    FedAvg().aggregate_train(1, replies)
    return replies.seconds()


def axpy(updates: Updates, num_sites: int) -> dict[str, float]:
    """Seconds of the plain sum."""
    flats = [np.concatenate([value.reshape(-1) for value in named.values()]) for named in updates.named]
    weight = np.float32(1.0 / num_sites)
    clock = Clock()
    total, product = np.zeros_like(flats[0]), np.empty_like(flats[0])
    for site in range(num_sites):
        total += np.multiply(weight, flats[site % _DISTINCT], out=product)
    return clock.seconds()
