"""Writes `report.html` for a run, and a page that compares runs: one file each, without scripts or network access.

Some text comes from sites. Templates escape all text, and the page's content security policy forbids scripts.
"""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from panfm.config import dump_toml, experiment_hash
from panfm.extras import needs_extra
from panfm.files import write_atomic
from panfm.privacy.guarantees import privacy_label
from panfm.report.blocks import Details, Paragraph, Section, Table
from panfm.report.image_sections import embedding_section, examples_section, experts_section
from panfm.report.monitor_sections import leakage_section, monitors_section
from panfm.report.round_sections import (
    cost_section,
    exchange_section,
    history_section,
    learning_section,
    left_out_section,
    privacy_section,
    saliency_section,
    sites_section,
)
from panfm.report.run_comparison import comparison_sections, comparison_verdict, run_names
from panfm.report.run_files import Run
from panfm.report.score_sections import (
    contract_section,
    evaluation_section,
    few_labels_section,
    label_section,
    missing_section,
    shared_probe_section,
    streams_section,
    task_section,
)
from panfm.report.status import gate_line
from panfm.report.verdict import Verdict, verdict

with needs_extra("report"):
    import jinja2

FILE = "report.html"
_SECTIONS = (
    task_section,
    contract_section,
    evaluation_section,
    label_section,
    few_labels_section,
    streams_section,
    shared_probe_section,
    learning_section,
    saliency_section,
    monitors_section,
    missing_section,
    leakage_section,
    embedding_section,
    examples_section,
    experts_section,
    sites_section,
    exchange_section,
    left_out_section,
    history_section,
    privacy_section,
    cost_section,
)


def write_report(run: Run, path: Path | None = None) -> Path:
    """Write a run's page, to `report.html` in its folder if no path is given, and return the path. Raises OSError."""
    path = path or run.folder / FILE
    write_atomic(path, render(run).encode())
    return path


def write_comparison(runs: Sequence[Run], path: Path) -> Path:
    """Write the page that compares runs, and return the path. Raises OSError."""
    facts = [f"{name}: {_state(run)}" for name, run in zip(run_names(runs), runs, strict=True)]
    page = _page("Comparison of runs", comparison_verdict(runs), facts, comparison_sections(runs))
    write_atomic(path, page.encode())
    return path


def render(run: Run) -> str:
    """Make the whole page of a run as HTML."""
    told = [section for make in _SECTIONS if (section := make(run)) is not None]
    privacy = f"Privacy: {privacy_label(run.config)}"
    facts = [_state(run), privacy, *filter(None, [gate_line(run)])]
    return _page(run.config.name, verdict(run), facts, [*told, _run_section(run)])


def _state(run: Run) -> str:
    state = "finished" if run.is_finished else "in progress" if run.state in ("running", "not begun") else run.state
    return f"{len(run.rounds)} of {run.config.train.rounds} rounds, {state}"


def _run_section(run: Run) -> Section:
    """Make the section with the run's full description, the hash of its experiment, seed and version."""
    facts = {
        "hash of the experiment": experiment_hash(run.config),
        "seed": str(run.config.seed),
        **{key: str(run.metadata[key]) for key in ("run-id", "rounds", "panfm", "intended-use") if key in run.metadata},
    }
    table = Table(("what", ""), list(facts.items()), "The run")
    words = "Research; not a medical device."
    return Section("run", "The run in full", [Paragraph(words), table, Details("run.toml", text=dump_toml(run.config))])


def _page(title: str, told: Verdict, facts: Sequence[str], sections: Sequence[Section]) -> str:
    words: dict[str, Any] = {"title": title, "verdict": told, "facts": facts, "sections": sections}
    return _environment().get_template("report.html").render(words)


@cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
