"""A mistake is told at once, before a library is imported that takes seconds; and a site that starts trains soon."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from panfm.config import load_run
from panfm.data.cache import open_store
from tests.cases import quick
from tests.federation.conftest import RUN

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "monai", "sklearn", "flwr", "jinja2", "numba", "scipy", "opacus", "nibabel", "tensorboardX", "ray")
HELP_S, MISTAKE_S, FIRST_STEP_S = 0.3, 0.6, 4.0
"""CPU seconds that were measured on a quiet machine; one that is at work takes up to twice as much."""
BUSY = 3.0
_PROGRAM = """
import json, resource, sys
sys.argv[1:] = {words!r}
try:
    {program}
except SystemExit as error:
    status = error.code
except Exception as error:
    status = 1
    print(error, file=sys.stderr)
heavy = [name for name in {heavy!r} if name in sys.modules]
used = resource.getrusage(resource.RUSAGE_SELF)
print(json.dumps([status, heavy, used.ru_utime + used.ru_stime]))
"""
PROGRAMS = {
    "panfm": "from panfm.cli import main; main()",
    "server": "from server.coordinator import app; app()",
    "simulations": "from simulations.__main__ import app; app()",
}


def ask(tool: str, *words: object) -> tuple[int, list[str], float, str]:
    """Exit status, heavy libraries that were imported, CPU seconds, and the last line of stderr."""
    return measure(PROGRAMS[tool], *words)


def measure(program: str, *words: object) -> tuple[int, list[str], float, str]:
    """Run a program in a process of its own; returns what `ask` does."""
    text = _PROGRAM.format(words=[str(word) for word in words], program=program, heavy=HEAVY)
    done = subprocess.run([sys.executable, "-c", text], cwd=ROOT, capture_output=True, text=True, check=True)
    status, heavy, seconds = json.loads(done.stdout.splitlines()[-1])
    return status, heavy, seconds, done.stderr.rstrip().rpartition("\n")[2]


@pytest.mark.parametrize("tool", PROGRAMS)
def test_help_imports_nothing_heavy(tool):
    status, heavy, seconds, _ = ask(tool, "--help")
    assert (status, heavy) == (0, [])
    assert seconds < BUSY * HELP_S


def test_a_ledger_in_which_nothing_is_spent_is_shown_without_torch(tmp_path):
    (tmp_path / "site.toml").write_text('name = "a"\n')
    status, heavy, seconds, _ = ask("panfm", "ledger", "show", tmp_path)
    assert (status, heavy) == (0, [])
    assert seconds < BUSY * MISTAKE_S


MISTAKES = {
    "panfm site check": ("panfm", "site", "check", "{site}", "--run", "{run}"),
    "panfm site dry-run": ("panfm", "site", "dry-run", "{site}", "--run", "{run}"),
    "panfm ledger plan": ("panfm", "ledger", "plan", "{run}"),
    "panfm audit step": ("panfm", "audit", "step", "{run}"),
    "panfm audit membership": ("panfm", "audit", "membership", "{folder}", "{site}"),
    "panfm audit inversion": ("panfm", "audit", "inversion", "{folder}", "{site}"),
    "panfm embed": ("panfm", "embed", "{folder}", "{site}", "--out", "x.npz"),
    "panfm embed --pooling": ("panfm", "embed", "{folder}", "{site}", "--out", "x.npz", "--pooling", "max"),
    "panfm finetune": ("panfm", "finetune", "{folder}", "--data", "{site}", "--task", "a.csv:b", "--out", "x"),
    "panfm whiten": ("panfm", "whiten", "{folder}", "{site}"),
    "panfm report": ("panfm", "report", "{folder}"),
    "panfm export": ("panfm", "export", "{folder}", "--to", "onnx", "--out", "x.onnx"),
    "panfm site start": ("panfm", "site", "start", "{folder}"),
    "panfm site status": ("panfm", "site", "status", "{folder}"),
    "panfm site log": ("panfm", "site", "log", "{folder}"),
    "panfm site end": ("panfm", "site", "end", "{folder}", "run-1"),
    "panfm site requests": ("panfm", "site", "requests", "{folder}"),
    "panfm site approve": ("panfm", "site", "approve", "{folder}", "0" * 64),
    "panfm site clean": ("panfm", "site", "clean", "{folder}"),
    "panfm ledger show": ("panfm", "ledger", "show", "{folder}"),
    "server start": ("server", "start", "{run}", "--connection", "x"),
    "server hash": ("server", "hash", "{run}"),
    "server status": ("server", "status", "{folder}"),
    "server watch": ("server", "watch", "{folder}"),
    "server resume": ("server", "resume", "{folder}"),
    "server stop": ("server", "stop", "{folder}"),
    "server export": ("server", "export", "{folder}", "--to", "onnx", "--out", "x.onnx"),
    "simulations run": ("simulations", "run", "{run}"),
    "simulations run --set": ("simulations", "run", "{sound}", "--set", "train.rounds=0"),
    "simulations run --resume": ("simulations", "run", "{run}", "--resume", "{folder}"),
    "simulations study": ("simulations", "study", "coding", "--experiment", "{run}"),
    "simulations bench": ("simulations", "bench", "aggregate", "--experiment={run}"),
}

IN_THE_DEFAULT_SUITE = ("panfm site check", "panfm embed", "panfm site start", "server start", "simulations run")
SITE_MISTAKES = tuple(
    f"panfm {words}"
    for words in (
        "site start",
        "site status",
        "site log",
        "site end",
        "site requests",
        "site approve",
        "site clean",
        "ledger show",
    )
)


@pytest.mark.parametrize("name", quick(MISTAKES, IN_THE_DEFAULT_SUITE))
def test_a_mistake_in_a_description_is_told_before_anything_heavy_is_imported(name, tmp_path):
    folder = tmp_path / ("model" if "{site}" in MISTAKES[name] and "{run}" not in MISTAKES[name] else "")
    write(tmp_path, RUN.replace("rounds = 3", "rounds = 0"))
    expected = "train.rounds: found 0"
    if name in SITE_MISTAKES:
        (tmp_path / "site.toml").write_text('name = "a"\nmanifest = 3\n')
        expected = "manifest: found 3, expected text"
    paths = {name: tmp_path / f"{name}.toml" for name in ("run", "sound")} | {"site": tmp_path, "folder": folder}
    tool, *words = (word.format(**paths) for word in MISTAKES[name])
    status, heavy, seconds, line = ask(tool, *words)
    assert expected in line
    assert (status, heavy) == (1, [])
    assert seconds < BUSY * MISTAKE_S


_FIRST_STEP = """
from pathlib import Path
from panfm.config import load_run
from panfm.data.task_labels import open_training_store
from panfm.training.trainer import Trainer
run = load_run(Path(sys.argv[1]))
store = open_training_store(Path(sys.argv[2]), run)
patients = store.members("train", "alpha")
Trainer(run, list(store.images)).train(store, patients, first_step=0, num_steps=1, site="alpha", round_number=1)
status = 0
"""


@pytest.mark.slow
def test_the_first_step_over_prepared_images_comes_soon(tmp_path, write_site):
    site, run = write_site(tmp_path / "alpha", "alpha", ("brain", "heart")), tmp_path / "run.toml"
    run.write_text(RUN)
    open_store(site, load_run(run).streams)
    status, heavy, seconds, _ = measure(textwrap.indent(_FIRST_STEP, "    ").strip(), run, site)
    assert status == 0
    assert "monai" not in heavy
    assert seconds < BUSY / 2 * FIRST_STEP_S


def write(folder: Path, faulty: str) -> None:
    (folder / "model").mkdir()
    (folder / "sound.toml").write_text(RUN)
    (folder / "run.toml").write_text(faulty)
    (folder / "model" / "run.toml").write_text(faulty)
    (folder / "site.toml").write_text('name = "a"\n')
