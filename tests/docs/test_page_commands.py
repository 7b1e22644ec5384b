"""Commands and Python blocks of README and docs: each is run, or is listed with the reason why not; all in one folder.

Tutorials run by tests/docs/test_tutorials.py, examples with `>>>` by tests/unit/notebook/test_python_page.py.
"""

import contextlib
import os
import re
import shlex
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from panfm.cli import main as panfm
from panfm.config import dump_toml, load_run
from server.coordinator import app as server
from server.run_folder import RunFolder
from simulations.__main__ import app as simulations
from simulations.engines.job import Job
from simulations.engines.local import run as run_local
from tests.docs.page_commands import (
    LANGUAGES,
    PAGES,
    ROOT,
    TUTORIALS,
    Rules,
    Step,
    code_blocks,
    is_known,
    matches,
    steps,
)
from tests.docs.page_workplace import write_converted_images, write_images
from tests.unit.models.test_public_weights import random_dinov2

TOOLS = {"panfm": panfm, "python -m simulations": simulations, "python -m server": server}
RULES = Rules.read()
STEPS = {name: steps(path.read_text()) for name, path in PAGES.items() if not name.startswith(TUTORIALS)}
RUN = {name: kept for name, listed in STEPS.items() if (kept := [step for step in listed if RULES.is_run(step)])}
MENTIONS = sorted(
    {
        " ".join(words.split())
        for path in PAGES.values()
        for words in re.findall(r"`((?:panfm|make|python -m [\w.]+) [a-z][^`]*)`", path.read_text())
    }
)
"""Commands in the text of pages."""
NAME = re.compile(r"(?:python -m [\w.]+|panfm|make)(?: [a-z][a-z-]*(?![\w/.=*]))*")
"""Words of a command before its arguments and options."""
needs_images = pytest.mark.skipif(
    not os.environ.get("PANFM_REAL_DATA"), reason="PANFM_REAL_DATA is not set: no real images"
)
README = "README.md"
HOSPITAL = Path("hospital/my-hospital")
SECTIONS = (
    *("verdict", "labels", "learning", "saliency", "missing-organs", "embedding", "examples"),
    *("sites", "exchange", "cost", "run"),
)
"""Sections of a report of a simulation with a hold-out that are never empty; experts need a model that has some."""


def tool_of(command: str) -> str:
    """The tool that a command begins with; empty if tests cannot run it."""
    return next((tool for tool in TOOLS if command.startswith(f"{tool} ")), "")


@pytest.mark.parametrize("page", STEPS)
def test_every_command_is_run_or_listed_with_a_reason(page: str) -> None:
    unknown = [step.text for step in STEPS[page] if not is_known(step)]
    assert unknown == [], "unknown programs: name them in tests/docs/page_commands.py"
    neither = [step.text for step in RUN.get(page, []) if not step.is_python and not tool_of(step.text)]
    assert neither == [], "neither run nor listed under `not-run` of tests/docs/page_commands.toml"


@pytest.mark.parametrize("page", PAGES)
def test_every_fenced_block_names_its_language(page: str) -> None:
    text = PAGES[page].read_text()
    fences = re.findall(r"^ *```(.*)$", text, re.MULTILINE)
    assert set(fences[::2]) <= {*LANGUAGES}
    assert set(fences[1::2]) <= {""}


def test_every_command_that_a_text_mentions_is_run_or_listed() -> None:
    """`panfm embed --pooling P` is run if any `panfm embed` is."""
    whole = [f"{step.text} " for kept in RUN.values() for step in kept] + [f"{text} " for text in RULES.patterns]
    missing = []
    for mention in MENTIONS:
        listed = any(matches(pattern, text) for pattern in RULES.patterns for text in (mention, f"{mention} "))
        name = NAME.match(mention)
        if not listed and not (name and any(text.startswith(f"{name[0]} ") for text in whole)):
            missing.append(mention)
    assert missing == []


def test_what_is_listed_is_on_a_page() -> None:
    commands = [*MENTIONS, *(step.text for listed in STEPS.values() for step in listed)]
    assert [pattern for pattern in RULES.patterns if not any(matches(pattern, text) for text in commands)] == []
    run = [step.text for kept in RUN.values() for step in kept]
    assert [words for words in RULES.options if not any(f"{text} ".startswith(f"{words} ") for text in run)] == []
    for page, names in RULES.names.items():
        texts = "\n".join(step.text for step in RUN[page])
        for old, new in names.items():
            assert old in texts, (page, old)
            texts = texts.replace(old, new)


def test_every_reason_is_short_and_what_runs_a_command_instead_exists() -> None:
    for entry in RULES.not_run:
        assert 0 < len(entry.reason) <= 120
        for file, text in entry.run_by.items():
            assert text in (ROOT / file).read_text(encoding="utf-8"), (entry.commands[0], file, text)


def test_commands_and_blocks_of_a_page() -> None:
    text = "a\n\n    panfm b \\\n        c   # why\n    # note\n\n"
    text += "```bash\nif [ -d x ]; then\n  X=1 make d     what\nfi\n```\n```\nshown\n```\n\n    [toml]\n\n"
    text += "```python\nx = 1\n\ny = 2\n```\n```python\n>>> z\n```\n1. List:\n\n       pip e\n"
    assert steps(text) == [
        Step(3, "panfm b c"),
        Step(9, "X=1 make d"),
        Step(19, "x = 1\n\ny = 2", True),
        Step(28, "pip e"),
    ]
    assert [(block.language, block.line) for block in code_blocks(text)][:3] == [("", 3), ("bash", 8), ("", 13)]
    assert matches("panfm * --x", "panfm [a] --x")
    assert not matches("panfm *", "make panfm x")


def run_steps(page: str, done: set[str]) -> None:
    """Run a page's commands and Python blocks in order, in the current folder, but for commands that were run.

    `<end>` stands for the end of the chain that the last verification printed.
    """
    names: dict[str, object] = {}
    end = ""
    for step in RUN[page]:
        text = RULES.runnable(page, step).replace("<end>", end)
        if step.is_python:
            exec(compile("\n" * (step.line - 1) + text, page, "exec"), names)
        elif text not in done:
            shown = invoke(text, f"{page}:{step.line}: {step.text}")
            done.add(text)
            end = [end, *re.findall(r"\b[0-9a-f]{64}\b", shown if "verify" in text else "")][-1]


def invoke(command: str, told: str = "") -> str:
    """Run a command in this process, with patterns of files as in a shell; returns what it printed.

    Args:
        told: Where the command stands, for the message if its status is not 0.
    """
    tool = tool_of(command)
    words: list[str] = []
    for word in shlex.split(command.removeprefix(tool)):
        words += sorted(map(str, Path().glob(word))) if "*" in word else [word]
    result = CliRunner().invoke(TOOLS[tool], words)
    assert result.exit_code == 0, f"{told}\n{command}\n{result.output}\n{result.exception!r}"
    return result.output


@pytest.fixture(scope="module")
def done() -> set[str]:
    """Commands that were run."""
    return set()


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory, done: set[str]) -> Path:
    """Folder with images of three hospitals, what the README's commands leave, and what other pages take as given."""
    folder = tmp_path_factory.mktemp("pages")
    with contextlib.chdir(folder):
        write_images()
        for hospital in ("south", "east"):  # the README has the command of one
            invoke(f"panfm site init sites/{hospital} --from {hospital} --yes")
        run_steps(README, done)
        write_converted_images(PAGES["docs/dicom.md"])
        Path("weights").mkdir()
        torch.save(random_dinov2(), "weights/dinov2-small")
        write_private_run()
    return folder


PRIVATE = (
    "objective.standardise=false", "masking.policy=random", "federation.min-sites=1", "train.rounds=1",
    "train.local-steps=2", "model.size=nano", "patient-dp.epsilon=8.0", "patient-dp.delta=1e-3",
    "patient-dp.public-subjects=50", "patient-dp.noise-multiplier=2.0", "patient-dp.sample-rate=0.2",
)  # fmt: skip


def write_private_run() -> None:
    """`experiment.toml`, a private run, and a hospital that has taken part in it for a round."""
    invoke(f"panfm site init {HOSPITAL} --name my-hospital --from north --yes")
    text = (HOSPITAL / "site.toml").read_text()
    limits = "[limits]\nepsilon = 8.0\ndelta = 1e-3\npublic-subjects = 50\n"
    (HOSPITAL / "site.toml").write_text(text.replace("[limits]\n", limits))
    run = load_run(Path("run.toml"), PRIVATE)
    Path("experiment.toml").write_text(dump_toml(run))
    RunFolder.create(Path("runs/private"), run)
    run_local(Job(HOSPITAL.parent, Path("runs/private")))


@pytest.mark.slow
def test_the_readme(workplace: Path) -> None:
    """The commands of the README make a model, scores, and a report whose sections have content; its notebook runs."""
    page = (workplace / "runs" / "own" / "report.html").read_text()
    parts = re.split(r'<section id="([\w-]+)"', page)
    sections = dict(zip(parts[1::2], parts[2::2], strict=True))
    assert {*sections} >= {*SECTIONS, "left-out", "privacy"}
    assert [key for key in SECTIONS if not re.search('<svg|<table|<img|class="bars"|kWh', sections[key])] == []
    assert len(page.encode()) < 3_000_000


@pytest.mark.slow
@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=needs_images if any("/real-" in step.text for step in kept) else ())
        for page, kept in RUN.items()
        if page != README
    ],
)
def test_a_page(page: str, workplace: Path, done: set[str]) -> None:
    with contextlib.chdir(workplace):
        run_steps(page, done)
