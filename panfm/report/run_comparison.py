"""Sections of the page that compares runs: scores side by side, curves in one chart, different run descriptions."""

import math
from collections.abc import Sequence

from panfm.config.differences import changed_keys
from panfm.evaluate.result import Score
from panfm.privacy.guarantees import privacy_label
from panfm.report.blocks import Figure, Figures, Paragraph, Section, Table, absent
from panfm.report.charts import COLOURS, Bar, Line, Points, interval_bars, line_chart
from panfm.report.console_tables import number_text, score_text
from panfm.report.run_files import Run
from panfm.report.score_sections import missing_curve
from panfm.report.status import clock, series
from panfm.report.verdict import AUC_WORDS, OURS, Verdict, best_site, main_scores


def run_names(runs: Sequence[Run]) -> list[str]:
    """Name each run by its folder, with as many parent folders as make all names different."""
    paths = [run.folder.resolve().parts for run in runs]
    for depth in range(1, max(map(len, paths)) + 1):
        names = ["/".join(parts[-depth:]) for parts in paths]
        if len({*names}) == len(names):
            return names
    return [f"{run.folder.name} ({number})" for number, run in enumerate(runs, start=1)]


def comparison_verdict(runs: Sequence[Run]) -> Verdict:
    """Write which run's model is best on its held-out patients, with a bar for each run."""
    names = run_names(runs)
    scored = [_federated(run) for run in runs]
    known = {name: score for name, score in zip(names, scored, strict=True) if score is not None}
    if not known:
        return Verdict("None of these runs has an AUC of held-out patients.", [])
    bars = [Bar(name, score.value, score.low, score.high, "ours") for name, score in known.items()]
    text = {name: score_text(score) for name, score in known.items()}
    for name, run in zip(names, runs, strict=True):
        site = best_site(main_scores(run.probe)) if run.probe else None
        if site is not None and name in known:
            label = f"{name}: best site alone, {site.arm.removeprefix('site:')}"
            bars.append(Bar(label, site.value, site.low, site.high, "site"))
            text[label] = score_text(site)
    chart = interval_bars(bars, start=0.5, axis="AUC, mean over labels, of held-out patients", text=text)
    best = max(known, key=lambda name: known[name].value)
    others = [name for name in known if name != best and known[name].value >= known[best].low]
    headline = f"{best} has the highest AUC, {number_text(known[best].value)}"
    if len(known) == 1:
        headline = f"Only {best} has an AUC of held-out patients: {number_text(known[best].value)}"
    elif others:
        headline += f"; its interval holds {', '.join(others)}, so these patients are too few to tell them apart"
    else:
        headline += ", and no other run is within its interval"
    return Verdict(f"{headline}.", _cautions(runs), chart, AUC_WORDS)


def _federated(run: Run) -> Score | None:
    score = run.probe.find(OURS, "all", "auc") if run.probe else None
    return None if score is None or math.isnan(score.value) else score


def _cautions(runs: Sequence[Run]) -> list[str]:
    """Sentences on why the scores of these runs may not be comparable."""
    first = runs[0]
    told = ["One run of each kind is not a comparison of methods: two runs that differ only in the seed differ too."]
    if any(run.config.cohort != first.config.cohort for run in runs):
        told.append("These runs are not on the same cohort: their scores are of other patients.")
    elif len({(run.probe.subjects.get("test"), len(run.probe.known)) for run in runs if run.probe}) > 1:
        told.append("These runs were not scored on the same patients and labels.")
    return told


def comparison_sections(runs: Sequence[Run]) -> list[Section]:
    """Make all sections of the page, in their order."""
    names = run_names(runs)
    return [
        _facts(runs, names),
        _labels(runs, names),
        _losses(runs, names),
        _missing(runs, names),
        _descriptions(runs, names),
    ]


def _facts(runs: Sequence[Run], names: Sequence[str]) -> Section:
    rows = []
    for name, run in zip(names, runs, strict=True):
        losses, seconds = ([value for _, value in series(run, key)] for key in ("loss", "seconds"))
        sent = sum(sum(run.bytes_by_group(way).values()) for way in ("up", "down"))
        rows.append((
            name, f"{len(run.rounds)} of {run.config.train.rounds}", run.state, str(len(run.site_names)),
            f"{losses[-1]:.4f}" if losses else "-", score_text(_federated(run)),
            clock(sum(seconds)) if seconds else "-", f"{sent / 1e6:.1f}", privacy_label(run.config),
        ))  # fmt: skip
    headings = ("run", "rounds", "state", "sites", "training loss", "AUC", "time", "megabytes sent", "privacy")
    return Section("runs", "The runs", [Table(headings, rows, "The runs side by side")])


def _labels(runs: Sequence[Run], names: Sequence[str]) -> Section:
    scores = [
        {(score.group, score.metric): score for score in (run.probe.labels if run.probe else ()) if score.arm == OURS}
        for run in runs
    ]
    keys = list(dict.fromkeys(key for of_run in scores for key in of_run))
    if not keys:
        return absent("labels", "Label by label", "None of these runs kept scores of single labels.")
    rows = [
        (
            label,
            {"auc": "AUC", "r2": "R2"}.get(metric, metric),
            *(score_text(of_run.get((label, metric))) for of_run in scores),
        )
        for label, metric in keys
    ]
    return Section("labels", "Label by label", [Table(("label", "score", *names), rows, "Federated model of each run")])


def _losses(runs: Sequence[Run], names: Sequence[str]) -> Section:
    words = "Losses of different objectives have different units."
    chart = _chart(
        "Training loss, mean over sites", names, [list(series(run, "loss")) for run in runs], "round", "loss"
    )
    reason = "None of these runs has reported a loss."
    return (
        Section("learning", "Learning curves", [Paragraph(words), chart])
        if chart
        else absent("learning", "Learning curves", reason)
    )


def _missing(runs: Sequence[Run], names: Sequence[str]) -> Section:
    curves = [missing_curve(run.probe.missing.get(OURS, {}) if run.probe else {}) for run in runs]
    chart = _chart("AUC of the federated models", names, curves, "organs missing", "AUC")
    title, reason = "When organs are missing", "None of these runs was scored with organs missing."
    return Section("missing-organs", title, [chart]) if chart else absent("missing-organs", title, reason)


def _chart(title: str, names: Sequence[str], curves: Sequence[Points], x: str, y: str) -> Figures | None:
    lines = [Line(points, f"c{number % COLOURS}") for number, points in enumerate(curves)]
    chart = line_chart(lines, x=x, y=y, words=f"{title}; the numbers are below the chart")
    if chart is None:
        return None
    ends = [points[-1][1] if points else math.nan for points in curves]
    rows = [
        (name, number_text(points[0][1] if points else math.nan), number_text(end))
        for name, points, end in zip(names, curves, ends, strict=True)
    ]
    numbers = Table(("run", "first", "last"), rows, title)
    legend = [(line.style, name) for line, name in zip(lines, names, strict=True)]
    return Figures([Figure(title, chart, legend, numbers)])


def _descriptions(runs: Sequence[Run], names: Sequence[str]) -> Section:
    """Make the section with the keys in which each run's description differs from the first run's."""
    rows = [
        (name, key, str(given), str(first))
        for name, run in zip(names[1:], runs[1:], strict=True)
        for key, (given, first) in changed_keys(run.config, runs[0].config).items()
    ]
    if not rows:
        return absent("descriptions", "What was described otherwise", "All runs have the same description.")
    table = Table(("run", "key", "value", f"value in {names[0]}"), rows, "Differences from the first run")
    return Section("descriptions", "What was described otherwise", [table])
