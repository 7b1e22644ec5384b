"""One page per run: `report.html`. It holds everything, scripts included, and opens without a network."""

import html
import math
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path

from panfm.config import config_hash, dump_toml
from panfm.files import write_atomic
from panfm.privacy.guarantees import privacy_label
from panfm.report.console_tables import arms_of, find, number_text, organs_of, score_text
from panfm.report.elements import STYLE, Rows, section, table
from panfm.report.plots import figures
from panfm.report.run_files import Run


def write_report(run: Run) -> Path:
    """Write `report.html` into the run folder and return its path."""
    path = run.folder / "report.html"
    write_atomic(path, render(run).encode())
    return path


def render(run: Run) -> str:
    """The whole page."""
    drawn = figures(run)
    script = files("plotly").joinpath("package_data/plotly.min.js").read_text(encoding="utf-8") if drawn else ""
    sections = [
        section("Sites", table(("site", "organs", "subjects", "rounds", "loss"), _site_rows(run))),
        section("Coverage", _coverage(run)),
        section("What frozen features are worth", _scores(run)),
        section("AUC of each stream alone", _streams(run)),
        *(section(title, figure.to_html(full_html=False, include_plotlyjs=False)) for title, figure in drawn.items()),
        section("Provenance", _provenance(run)),
    ]
    title = html.escape(run.config.name)
    state = "finished" if run.is_finished else "in progress"
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{STYLE}</style><script>{script}</script></head><body><h1>{title}</h1>"
        f'<p class="quiet">{len(run.rounds)} of {run.config.train.rounds} rounds, {state}</p>'
        f"<p>Privacy: {html.escape(privacy_label(run.config))}</p>"
        f"{''.join(sections)}</body></html>\n"
    )


def _site_rows(run: Run) -> Rows:
    for site in run.site_names:
        holdings = run.sites.get(site, {})
        rounds, losses = run.series(site, "loss")
        loss = f"{losses[0]:.3f} → {losses[-1]:.3f}" if losses else "-"
        yield site, ", ".join(organs_of(holdings)), str(holdings.get("subjects") or "-"), str(len(rounds)), loss


def _coverage(run: Run) -> str:
    """Subjects per stream and site."""
    if not run.sites:
        return ""
    rows = (
        (stream, *(_held(run.sites.get(site, {}).get("streams", {}), stream) for site in run.site_names))
        for stream in run.config.streams
    )
    return table(("stream", *run.site_names), rows)


def _held(streams: Mapping[str, int | None], stream: str) -> str:
    """Subjects with a stream; only that there are some, where their number is withheld."""
    return str(streams[stream] or "held") if stream in streams else "·"


def _scores(run: Run) -> str:
    if run.probe is None:
        return '<p class="quiet">Not probed yet.</p>'
    tables = []
    for metric, words in (("auc", "AUC"), ("r2", "R2")):
        groups = list(dict.fromkeys(score.group for score in run.probe.scores if score.metric == metric))
        if groups:
            rows = [
                (arm, *(score_text(find(run.probe, arm, group, metric)) for group in groups))
                for arm in arms_of(run.probe, metric)
            ]
            tables.append(table((words, *groups), rows))
    counts = f"{run.probe.subjects.get('fit', 0)} subjects fitted, {run.probe.subjects.get('test', 0)} held out"
    lines = [f"{counts}; in brackets 95 % bootstrap intervals over held-out subjects.", *run.probe.notes]
    return "".join(tables) + "".join(f'<p class="quiet">{html.escape(line)}</p>' for line in lines)


def _streams(run: Run) -> str:
    """One row per stream, one column per arm; nothing where subjects hold several streams."""
    by_arm = run.probe.streams if run.probe else {}
    names = dict.fromkeys(name for row in by_arm.values() for name in row)
    rows = [(name, *(number_text(row.get(name, math.nan)) for row in by_arm.values())) for name in names]
    return table(("stream", *by_arm), rows) if rows else ""


def _provenance(run: Run) -> str:
    facts = {
        "configuration hash": config_hash(run.config),
        "seed": str(run.config.seed),
        **{key: str(run.metadata[key]) for key in ("run-id", "rounds", "panfm", "intended-use") if key in run.metadata},
    }
    text = html.escape(dump_toml(run.config))
    return table(("what", ""), facts.items()) + f"<details><summary>run.toml</summary><pre>{text}</pre></details>"
