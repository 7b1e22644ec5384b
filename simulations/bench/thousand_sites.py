"""Cost of 1,000 sites beyond their training: a whole run of `--engine local` over the training alone.

Each site is a small hospital of its own on disk: ten phantom patients, scans of two of seven organs, a
`nano` model. A tenth of the sites is asked in a round, and takes 20 local steps. As most sites come
back after many rounds, hardly one is warm when it is asked.

    local   the real run from its handshakes to its model: everything that a round takes
    pure    `Trainer.train` for the same sites with as many steps, and nothing else: models, patch features and images
            are in memory before its clock starts

The arms take turns, round by round. `over_pure` is the ratio of their medians over the rounds, in seconds on the clock
per site and round; beside it stands the same in CPU seconds, which a busy machine disturbs less. `memory_grown` and
`files_grown` are what the process had filled at most, and its open files, after the last round over after the first.
The handshakes are told apart; making the images comes before it all.
"""

import resource
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.progress import track

from client.app import app as client_app
from panfm.anatomy import parse_stream
from panfm.config import RunConfig, site_folders
from panfm.data.cache import open_store
from panfm.sharing.messages import Handshake
from panfm.site.session import trained_streams
from panfm.training.trainer import Trainer
from server.console import Progress
from server.rounds import run_federation
from server.run_folder import RunFolder
from simulations.alone import train_round
from simulations.bench._steps import Clock
from simulations.cohorts.phantom import PhantomCohort, PhantomSiteConfig
from simulations.cohorts.prepare import load_simulation, prepare_cohort, with_cohort
from simulations.engines.job import Job
from simulations.engines.local import LocalGrid
from simulations.engines.logs import logged_to
from simulations.harness import TRANSIENT, bench
from simulations.study_result import StudyResult

_SUBJECTS = 10
_ORGANS_PER_SITE = 2
_TELL_EVERY = 100
"""Handshakes per line of progress."""


@bench
def main(
    sites: Annotated[
        int, typer.Option(min=2, max=10_000, help="Sites; a tenth is asked in a round, at least 2.")
    ] = 1000,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds.")] = 6,
) -> StudyResult:
    """Seconds per site and round: many sites in one process against their training alone."""
    console = Console(soft_wrap=True, highlight=False)
    run = describe(sites, rounds)
    cohort = prepare_cohort(run, console) / "sites"
    for site in track(site_folders(cohort), "images: preprocessing", console=console):
        open_store(site, run.streams)
    result = StudyResult("thousand-sites", {"sites": sites, "rounds": rounds, "subjects": _SUBJECTS}, unit="s")
    with tempfile.TemporaryDirectory() as temporary:
        job = Job(cohort, Path(temporary, "run"))
        folder = RunFolder.create(job.run_dir, run)
        grid = LocalGrid(client_app, job.num_sites, job.run_config())
        turns = Turns(run, cohort, result, console)
        with logged_to(job.log):
            run_federation(grid, folder, turns, num_sites=sites)
    for metric, name in (("seconds", "over_pure"), ("cpu_seconds", "over_pure_cpu")):
        local, pure = (float(np.median(result.values[metric, arm])) for arm in ("local", "pure"))
        result.ratios[name] = local / pure
        console.print(f"{name}: {result.ratios[name]:.3f} ({1e3 * local:.1f} ms over {1e3 * pure:.1f} ms)")
    for resource_name, name in (("peak_gib", "memory_grown"), ("open_files", "files_grown")):
        first, last = turns.resources[0][resource_name], turns.resources[-1][resource_name]
        result.ratios[name] = last / first
        console.print(f"{resource_name}: {first:.4g} after the first round, {last:.4g} after the last")
    return result


def describe(num_sites: int, rounds: int) -> RunConfig:
    """The run `transient` with many small hospitals in place of its five."""
    overrides = [f"train.rounds={rounds}", "federation.participation=0.1", "model.size=nano"]
    run = load_simulation(TRANSIENT, overrides)
    organs = [parse_stream(stream)[0] for stream in run.streams]
    sites = {
        f"site-{number:04d}": PhantomSiteConfig(
            organs=tuple(organs[(number + offset) % len(organs)] for offset in range(_ORGANS_PER_SITE)),
            subjects=_SUBJECTS,
        )
        for number in range(num_sites)
    }
    return with_cohort(run, PhantomCohort(kind="phantom", holdout_subjects=1, sites=sites))


class Turns(Progress):
    """Reads the clock of the run at the end of each round, and lets the other arm take its turn."""

    def __init__(self, run: RunConfig, sites: Path, result: StudyResult, console: Console) -> None:
        super().__init__(console)
        self.resources: list[dict[str, float]] = []
        """Memory and open files of the process after each round."""
        self._pure = PureTraining(run, sites)
        self._result = result
        self._num_sites = 0
        self._clock = Clock()

    def site(self, handshake: Handshake) -> None:
        """Count a site that has shaken hands."""
        self._num_sites += 1
        if self._num_sites % _TELL_EVERY == 0:
            self._console.print(f"{self._num_sites} sites have shaken hands")

    def privacy(self, label: str) -> None:
        """All sites have shaken hands: the rounds begin."""
        measured = self._clock.seconds(self._num_sites)
        self._result.add("handshakes", measured)
        self._console.print(f"handshakes: {1e3 * measured['seconds']:.1f} ms per site")
        self._clock = Clock()

    def round(self, num_rounds: int, line: Mapping[str, Any]) -> None:
        """A round has ended; the other arm trains its sites again."""
        local = self._clock.seconds(len(line["sites"]) + len(line["rejected"]))
        self._result.add("local", local)
        self.resources.append(_resources())
        pure = self._pure.train(line["sites"], line["round"])
        self._result.add("pure", pure)
        super().round(num_rounds, line)
        self._console.print(f"  per site: local {1e3 * local['seconds']:.1f} ms, pure {1e3 * pure['seconds']:.1f} ms")
        self._clock = Clock()


class PureTraining:
    """The training of some sites, one after the other; sites with the same streams share a trainer."""

    def __init__(self, run: RunConfig, sites: Path) -> None:
        self._run = run
        self._sites = sites
        self._trainers: dict[tuple[str, ...], Trainer] = {}

    def train(self, sites: Iterable[str], round_number: int) -> dict[str, float]:
        """Seconds per site."""
        torch.set_num_threads(self._run.train.threads)
        ready = []
        for site in sites:
            store = open_store(self._sites / site, self._run.streams)
            trainer = self._trainer(tuple(trained_streams(self._run.streams, store)))
            trainer.patch_features(store)
            ready.append((site, trainer, store))
        clock = Clock()
        for site, trainer, store in ready:
            train_round(trainer, store, site, round_number)
        return clock.seconds(len(ready))

    def _trainer(self, streams: tuple[str, ...]) -> Trainer:
        if streams not in self._trainers:
            self._trainers[streams] = Trainer(self._run, streams)
        return self._trainers[streams]


def _resources() -> dict[str, float]:
    """Peak memory of the process so far, and its open files."""
    return {
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "open_files": len(list(Path("/dev/fd").iterdir())),
    }
