"""Cost of frameworks: one federated job in this project and in others, over the same training in a plain loop.

    plain     every site in turn, then the mean: no framework
    local     this project, all in one process
    ray       this project on Flower's simulation engine
    flower    Flower's FedAvg and a ClientApp as in its examples, on the same engine
    pfl       pfl-research: FederatedAveraging in its simulated backend, one process
    nvflare   NVFlare: FedAvg recipe in its simulator, a process per client
    fedlab    FedLab: synchronous server, serial clients, one process

The job: FedAvg over eight sites of 32 patients with brain scans, masked auto-encoder of about 1, 20 or 100 MB of
float32 parameters, the same images, steps and seeds; every arm calls the same local training. Sites begin each round
with a new optimiser (`train.optimiser-state = "fresh"`), as the examples of these frameworks do, and no update is
shortened (`sharing.guards.norm-ratio`), so all arms must end with the same model: `difference` is the norm of what lies
between an arm's model and that of `plain`, over the norm of what training moved.

Counted are CPU seconds of all processes, per round: a run of many rounds minus a run of one, over the rounds between,
so that start-up drops out. Wall seconds and peak memory are of the long run, start-up included. `<MB>/<arm>_over_plain`
are ratios of CPU seconds per round; `panfm_over_pure` is that of `local` at 20 MB.

Other frameworks are installed by pip into environments of their own, once; what cannot be installed or does not run is
named with the reason under `absent` in the result's `config`.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from panfm.config import RunConfig, dump_toml
from panfm.errors import RunError
from panfm.training.trainer import Trainer
from simulations.cohorts.phantom import PhantomCohort, PhantomSiteConfig
from simulations.cohorts.prepare import load_simulation, prepare_cohort, with_cohort
from simulations.harness import TRANSIENT, bench, chosen_arms
from simulations.study_result import StudyResult

ROOT = Path(__file__).resolve().parents[2]
NUM_SITES, SUBJECTS = 8, 32
SIZES = {"1": "nano", "20": "tiny", "100": "small"}
"""About so many MB -> size of the model."""
_STREAM = "brain-mr"
_TIMEOUT_S = 900.0
_JOBS = "simulations.bench.peer_jobs"


@dataclass(frozen=True)
class Arm:
    """A way to run the job."""

    module: str
    """Of the package peer_jobs."""
    words: tuple[str, ...] = ()
    package: str = ""
    """What pip installs; empty for arms that run in this environment."""


ARMS: Mapping[str, Arm] = {
    "plain": Arm("plain_loop"),
    "local": Arm("panfm_job", ("local",)),
    "ray": Arm("panfm_job", ("ray",)),
    "flower": Arm("flower_job"),
    "pfl": Arm("pfl_job", package="pfl[pytorch]"),
    "nvflare": Arm("nvflare_job", package="nvflare"),
    "fedlab": Arm("fedlab_job", package="fedlab"),
}


@bench
def main(
    rounds: Annotated[int, typer.Option(min=2, help="Rounds of the long run.")] = 3,
    steps: Annotated[int, typer.Option(min=1, help="Local steps of a round.")] = 20,
    sizes: Annotated[str, typer.Option(help="MB of the models, with commas between.")] = ",".join(SIZES),
    arms: Annotated[
        str, typer.Option(help="Ways to run the job, with commas between; plain is always run.")
    ] = ",".join(ARMS),
    environments: Annotated[
        Path | None, typer.Option(help="Folder of the other frameworks' environments; by default in the user's cache.")
    ] = None,
) -> StudyResult:
    """CPU seconds of a round in this project and in other frameworks, over plain training."""
    console = Console(soft_wrap=True, highlight=False)
    chosen, megabytes = chosen_arms(f"plain,{arms}", ARMS), chosen_arms(sizes, SIZES, "--sizes")
    folder = environments or Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"), "panfm", "bench-peers")
    config = {"rounds": rounds, "steps": steps, "sites": NUM_SITES, "subjects": SUBJECTS, "pairs": [[0, 0]]}
    result = StudyResult("peers", config, unit="s")
    pythons, absent = installed(chosen, folder.absolute(), console)
    result.config["absent"] = absent
    for size in megabytes:
        _measure_size(result, size, pythons, console)
    if ("20/cpu_per_round", "local") in result.values:
        result.ratios["panfm_over_pure"] = result.ratios["20/local_over_plain"]
    for arm, reason in absent.items():
        console.print(f"{arm}: not measured: {reason}")
    return result


def installed(arms: list[str], folder: Path, console: Console) -> tuple[dict[str, str], dict[str, str]]:
    """Arm -> its interpreter, in environments that are made where they are not yet; and arm -> why it has none."""
    pythons, absent = {}, {}
    for arm in arms:
        if not (package := ARMS[arm].package):
            pythons[arm] = sys.executable
            continue
        python, mark = folder / arm / "bin" / "python", folder / arm / "installed"
        if not mark.exists():
            console.print(f"{arm}: installing {package} into {folder / arm}")
            folder.mkdir(parents=True, exist_ok=True)
            if reason := _install(package, folder / arm):
                absent[arm] = f"cannot be installed: {reason}"
                continue
            mark.write_text(package, encoding="utf-8")
        pythons[arm] = str(python)
    return pythons, absent


def _install(package: str, environment: Path) -> str:
    """Make an environment with a package, this project's base and the pinned torch; why not, if it cannot be."""
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    (torch_pin,) = (pin for pin in pins if pin.startswith("torch=="))
    for words in (
        [sys.executable, "-m", "venv", "--clear", str(environment)],
        [str(environment / "bin" / "python"), "-m", "pip", "install", "--quiet", torch_pin, package, str(ROOT)],
    ):
        done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
        if done.returncode:
            return _last_line(done.stdout)
    return ""


def _measure_size(result: StudyResult, size: str, pythons: Mapping[str, str], console: Console) -> None:
    """Run all arms at one size."""
    rounds, models = result.config["rounds"], {}
    for arm, python in pythons.items():
        if arm in result.config["absent"]:
            continue
        try:
            with tempfile.TemporaryDirectory(prefix="panfm-peers-") as folder:
                one, many = (run_arm(arm, python, describe(size, number, result.config["steps"]), Path(folder))
                             for number in (1, rounds))  # fmt: skip
                models[arm] = torch.load(Path(folder, "model.pt"))
        except RunError as error:
            if not ARMS[arm].package:
                raise
            result.config["absent"][arm] = str(error)
            continue
        measured = {
            "cpu_per_round": (many["cpu_seconds"] - one["cpu_seconds"]) / (rounds - 1),
            "seconds": many["seconds"],
            "peak_mib": many["peak_mib"],
            "difference": difference(models[arm], models["plain"], describe(size, rounds, result.config["steps"])),
        }
        result.add(arm, {f"{size}/{name}": value for name, value in measured.items()})
        ratio = measured["cpu_per_round"] / result.mean(f"{size}/cpu_per_round", "plain")
        result.add(arm, {f"{size}/over_plain": ratio})
        result.ratios[f"{size}/{arm}_over_plain"] = ratio
        console.print(f"{size} MB, {arm}: {ratio:.3f}, " + ", ".join(f"{key} {of:.4g}" for key, of in measured.items()))


def describe(size: str, rounds: int, steps: int) -> RunConfig:
    """The job as a run description."""
    overrides = {
        "train.rounds": rounds, "train.local-steps": steps, "train.batch-size": 8, "train.validate-every": 1000,
        "train.optimiser-state": "fresh", "model.size": SIZES[size], "model.tokenizer": "patch",
        "objective.name": "mae", "masking.policy": "random", "sharing.rule": "plain",
        "sharing.guards.norm-ratio": 1e6,
    }  # fmt: skip
    run = load_simulation(TRANSIENT, [f"{key}={value}" for key, value in overrides.items()])
    stream = run.streams[_STREAM].model_copy(update={"spacing_mm": (8.0,) * 3, "shape": (24,) * 3, "patch": (8,) * 3})
    run = run.model_copy(update={"streams": {_STREAM: stream}})
    site = PhantomSiteConfig(organs=("brain",), subjects=SUBJECTS)
    sites = {f"site-{number}": site for number in range(NUM_SITES)}
    return with_cohort(run, PhantomCohort(kind="phantom", holdout_subjects=1, sites=sites))


def run_arm(arm: str, python: str, run: RunConfig, folder: Path) -> dict[str, float]:
    """Run the job once; what it took. Raises RunError if it failed."""
    sites = (prepare_cohort(run, Console(quiet=True)) / "sites").resolve()
    (folder / "run.toml").write_text(dump_toml(run), encoding="utf-8")
    files = {"run": str(folder / "run.toml"), "sites": str(sites), "model": str(folder / "model.pt")}
    (folder / "job.json").write_text(json.dumps(files), encoding="utf-8")
    out = folder / "taken.json"
    job = [python, "-m", f"{_JOBS}.{ARMS[arm].module}", str(folder / "job.json"), *ARMS[arm].words]
    words = [sys.executable, "-m", f"{_JOBS}.measured_process", str(out), *job]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(
            words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=_TIMEOUT_S,
            check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise RunError(f"did not end within {_TIMEOUT_S:g} s") from error
    taken: dict[str, float] = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {"status": 1}
    if taken.pop("status") or not (folder / "model.pt").exists():
        raise RunError(f"does not run: {_last_line(done.stdout)}")
    return taken


def difference(model: Mapping[str, torch.Tensor], plain: Mapping[str, torch.Tensor], run: RunConfig) -> float:
    """Norm of what lies between two models, over the norm of what training moved."""
    start = Trainer(run).shared_state()
    between = sum(float((model[name] - value).square().sum()) for name, value in plain.items())
    moved = sum(float((start[name] - value).square().sum()) for name, value in plain.items())
    return float((between / moved) ** 0.5)


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if "rror" in line] or text.strip().splitlines() or ["no output"]
    return lines[-1][:300]
