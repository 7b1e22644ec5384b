"""One page per run, `report.html`: it holds everything, scripts included, and opens without a network.

One colour per site throughout; a figure without data is left out.
"""

import html
import math
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path

from panfm.config import config_hash, dump_toml
from panfm.errors import needs_extra
from panfm.files import write_atomic
from panfm.privacy.guarantees import privacy_label
from panfm.report.console_tables import (
    arms_of,
    label_rows,
    missing_counts,
    number_text,
    organs_of,
    score_text,
    summary,
    unmatched_lines,
)
from panfm.report.html_parts import STYLE, Rows, section, table
from panfm.report.run_files import Run
from panfm.report.status import gate_line


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
        section("Every label", _labels(run)),
        section("AUC of each stream alone", _streams(run)),
        section("Probes from the labels of all sites", _label_probes(run)),
        *(section(title, figure.to_html(full_html=False, include_plotlyjs=False)) for title, figure in drawn.items()),
        section("Provenance", _provenance(run)),
    ]
    title = html.escape(run.config.name)
    state = "finished" if run.is_finished else "in progress"
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{STYLE}</style><script>{script}</script></head><body><h1>{title}</h1>"
        f'<p class="quiet">{len(run.rounds)} of {run.config.train.rounds} rounds, {state}</p>'
        f"<p>Privacy: {html.escape(privacy_label(run.config))}</p><p>{html.escape(gate_line(run))}</p>"
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
        (stream, *(_subject_count(run.sites.get(site, {}).get("streams", {}), stream) for site in run.site_names))
        for stream in run.config.streams
    )
    return table(("stream", *run.site_names), rows)


def _subject_count(streams: Mapping[str, int | None], stream: str) -> str:
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
                (arm, *(score_text(run.probe.find(arm, group, metric)) for group in groups))
                for arm in arms_of(run.probe, metric)
            ]
            tables.append(table((words, *groups), rows))
    if few := run.probe.few_labels:
        metrics = list(dict.fromkeys(metric for row in few.values() for metric in row))
        rows = [(arm, *(number_text(row.get(metric, math.nan)) for metric in metrics)) for arm, row in few.items()]
        tables.append(table(("AUC", *(f"{metric.removeprefix('auc_')} labelled" for metric in metrics)), rows))
    tables += [f"<p>{html.escape(sentence)}</p>" for sentence in summary(run.probe)]
    counts = f"{run.probe.subjects.get('fit', 0)} subjects fitted, {run.probe.subjects.get('test', 0)} held out"
    lines = [f"{counts}; in brackets 95 % bootstrap intervals over held-out subjects."]
    lines += [*unmatched_lines(run.probe), *run.probe.notes]
    return "".join(tables) + "".join(f'<p class="quiet">{html.escape(line)}</p>' for line in lines)


def _labels(run: Run) -> str:
    """One row per label: subjects for whom it is known, and one column per arm."""
    if run.probe is None or not run.probe.labels:
        return ""
    arms, known = list(dict.fromkeys(score.arm for score in run.probe.labels)), run.probe.known
    rows = (
        (label, metric, *(str(known.get(label, {}).get(side, "-")) for side in ("fit", "test")), *cells)
        for label, metric, cells in label_rows(run.probe, arms)
    )
    return table(("label", "metric", "fitted", "held out", *arms), rows)


def _streams(run: Run) -> str:
    """One row per stream, one column per arm; nothing where subjects hold several streams."""
    by_arm = run.probe.streams if run.probe else {}
    names = dict.fromkeys(name for row in by_arm.values() for name in row)
    rows = [(name, *(number_text(row.get(name, math.nan)) for row in by_arm.values())) for name in names]
    return table(("stream", *by_arm), rows) if rows else ""


def _label_probes(run: Run) -> str:
    """Probes that all sites' labelled patients gave at the end of the run."""
    told = run.metadata.get("probe", {})
    rows = [
        (
            task,
            str(probe["patients"]),
            ", ".join(probe["sites"]),
            " ".join(number_text(math.nan if value is None else value) for value in probe["r2"]),
        )
        for task, probe in told.get("tasks", {}).items()
    ]
    left_out = [f"{name}: {reason}" for name, reason in told.get("left-out", {}).items()]
    lines = "".join(f'<p class="quiet">{html.escape(line)} (left out)</p>' for line in left_out)
    return (table(("task", "patients", "sites", "leave-one-out R2"), rows) if rows else "") + lines


def _provenance(run: Run) -> str:
    facts = {
        "configuration hash": config_hash(run.config),
        "seed": str(run.config.seed),
        **{key: str(run.metadata[key]) for key in ("run-id", "rounds", "panfm", "intended-use") if key in run.metadata},
    }
    text = html.escape(dump_toml(run.config))
    return table(("what", ""), facts.items()) + f"<details><summary>run.toml</summary><pre>{text}</pre></details>"


with needs_extra("report"):
    from plotly import graph_objects as go
    from plotly.colors import qualitative
    from plotly.subplots import make_subplots

_COLOURS = qualitative.D3
_COLUMNS = 3


def figures(run: Run) -> dict[str, go.Figure]:
    """Title -> figure."""
    drawn = {
        "Loss per site": loss_figure(run),
        "Saliency per stream (1 is a fair share)": saliency_figure(run),
        "Bytes sent per group": bytes_figure(run),
        "AUC with organs missing": missing_figure(run),
        "What the loss of one organ costs": drop_figure(run),
    }
    return {title: _styled(figure) for title, figure in drawn.items() if figure.data}


def loss_figure(run: Run) -> go.Figure:
    """Training loss by round, dashed: validation loss."""
    figure = go.Figure()
    for number, site in enumerate(run.site_names):
        for key, dash in (("loss", "solid"), ("validation_loss", "dash")):
            rounds, values = run.series(site, key)
            if rounds:
                name = site if key == "loss" else f"{site}, validation"
                line = {"color": _colour(number), "dash": dash}
                figure.add_scatter(x=rounds, y=values, name=name, line=line, mode="lines+markers")
    return figure.update_layout(xaxis_title="round", yaxis_title="loss")


def saliency_figure(run: Run) -> go.Figure:
    """One panel per stream, one line per site."""
    told = {site: run.series(site, "saliency") for site in run.site_names}
    streams = [
        name
        for name in run.config.streams
        if any(name in by_stream for _, values in told.values() for by_stream in values)
    ]
    if not streams:
        return go.Figure()
    rows = -(-len(streams) // _COLUMNS)
    figure = make_subplots(rows, _COLUMNS, subplot_titles=streams, shared_xaxes=True, shared_yaxes=True)
    named = set()
    for number, (site, (rounds, values)) in enumerate(told.items()):
        for panel, stream in enumerate(streams):
            points = [
                (at, by_stream[stream]) for at, by_stream in zip(rounds, values, strict=True) if stream in by_stream
            ]
            if points:
                x, y = zip(*points, strict=True)
                line = go.Scatter(x=x, y=y, name=site, legendgroup=site, line={"color": _colour(number)}, mode="lines")
                line.showlegend = site not in named
                named.add(site)
                figure.add_trace(line, row=panel // _COLUMNS + 1, col=panel % _COLUMNS + 1)
    return figure.update_layout(height=max(300, 200 * rows))


def bytes_figure(run: Run) -> go.Figure:
    """Megabytes over the whole run, to and from the sites."""
    figure = go.Figure()
    for number, (direction, words) in enumerate((("up", "from the sites"), ("down", "to the sites"))):
        total = run.bytes_by_group(direction)
        if total:
            sizes = [size / 1e6 for size in total.values()]
            figure.add_bar(x=list(total), y=sizes, name=words, marker_color=_colour(number))
    return figure.update_layout(yaxis_title="MB")


def missing_figure(run: Run) -> go.Figure:
    """AUC by number of missing organs."""
    figure = go.Figure()
    missing = run.probe.missing if run.probe else {}
    counts = missing_counts(missing)
    for number, (arm, grid) in enumerate(missing.items()):
        values = [grid.get(f"auc_missing_{count}" if count else "auc") for count in counts]
        figure.add_scatter(x=counts, y=values, name=arm, line={"color": _colour(number)}, mode="lines+markers")
    return figure.update_layout(xaxis_title="organs missing", yaxis_title="AUC")


def drop_figure(run: Run) -> go.Figure:
    """Fall of the AUC when one organ is taken away."""
    figure = go.Figure()
    for number, (arm, grid) in enumerate(run.probe.missing.items() if run.probe else ()):
        drops = {name.removeprefix("auc_drop_"): drop for name, drop in grid.items() if name.startswith("auc_drop_")}
        if drops:
            figure.add_bar(x=list(drops), y=list(drops.values()), name=arm, marker_color=_colour(number))
    return figure.update_layout(yaxis_title="fall of AUC")


def _colour(number: int) -> str:
    return str(_COLOURS[number % len(_COLOURS)])


def _styled(figure: go.Figure) -> go.Figure:
    return figure.update_layout(template="plotly_white", margin={"t": 30, "l": 50, "r": 20, "b": 40}, showlegend=True)
