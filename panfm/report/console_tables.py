"""Tables of a run for the console: who took part, and how the features scored."""

import math
from collections.abc import Iterator, Mapping, Sequence

from rich.console import Console
from rich.table import Column, Table

from panfm.anatomy import parse_stream
from panfm.data.joins import counted
from panfm.evaluate.result import ENSEMBLE, GAIN, PERSONALISED, Leakage, ProbeResult, Score
from panfm.privacy.guarantees import privacy_label
from panfm.report.run_files import Run

_MOST_LABELS = 20
"""Labels up to which the console shows each; the HTML report always does."""
_TASK_WORDS = {
    "federated": "the run's model",
    PERSONALISED: "the personalised model",
    ENSEMBLE: "the mean of both predictions",
}
_KEPT = {
    "federated": "the federated model",
    PERSONALISED: "the personalised model",
    ENSEMBLE: "the ensemble with the federated model",
    "start": "the model that the run started from",
}
"""Model beside its own that a site could keep -> words; the first of them is named where no difference is shown."""
LEAKAGE_WORDS = {
    ("presence", "variance"): "organs: share of variance",
    ("presence", "auc"): "organs: AUC of a probe",
    ("site", "variance"): "site: share of variance",
    ("site", "accuracy"): "site: accuracy of a probe",
    ("site", "accuracy-of-presence"): "site: accuracy from organs",
}
_LABEL_ARMS = ("federated", "untrained", "statistics")


def print_tables(run: Run, console: Console) -> None:
    """Print all tables for which there are data, each with the run's privacy label below it."""
    label = privacy_label(run.config)
    for table in (site_table(run), *(probe_tables(run.probe) if run.probe else ())):
        table.caption = None if label == "none" else f"privacy: {label}"
        console.print(table)
    for sentence in [*benefit_lines(run.probe), *contract_lines(run.probe), *summary(run.probe)] if run.probe else ():
        console.print(sentence)
    for note in [*unmatched_lines(run.probe), *run.probe.notes] if run.probe else ():
        console.print(f"note: {note}", style="dim")


def probe_tables(probe: ProbeResult) -> Iterator[Table]:
    """Tables of the probes' scores; that of a task's predictions first."""
    if probe.task:
        yield task_table(probe)
    for metric in ("auc", "r2"):
        if any(score.metric == metric for score in probe.scores):
            yield score_table(probe, metric)
    if probe.benefit:
        yield contract_table(probe)
    if probe.labels and len(probe.known) <= _MOST_LABELS:
        yield label_table(probe)
    if probe.few_labels:
        yield few_labels_table(probe.few_labels)
    if len(missing_counts(probe.missing)) > 1:
        yield missing_table(probe.missing)
    if probe.streams:
        yield stream_table(probe.streams)
    if probe.leakage:
        yield leakage_table(probe)


def leakage_table(probe: ProbeResult) -> Table:
    """One row per measure of leakage, one column per arm."""
    arms, rows = leakage_rows(probe)
    table = Table(Column("embedding says only", no_wrap=True), *map(_right, arms), _right("chance"))
    table.title = "Leakage: organs present, and a patient's site (95 % interval)"
    for row in rows:
        table.add_row(*row)
    return table


def leakage_rows(probe: ProbeResult) -> tuple[list[str], list[tuple[str, ...]]]:
    """Arms, and a row of each measure of leakage: its name, a text for each arm, the value by chance."""
    arms = list(dict.fromkeys(score.arm for score in probe.leakage))
    by_measure = {(score.kind, score.metric, score.arm): score for score in probe.leakage}
    measures = dict.fromkeys((score.kind, score.metric) for score in probe.leakage)
    rows = []
    for kind, metric in measures:
        scores = [by_measure.get((kind, metric, arm)) for arm in arms]
        chance = next(score.chance for score in scores if score)
        rows.append((LEAKAGE_WORDS[kind, metric], *map(score_text, scores), number_text(chance)))
    return arms, rows


def site_table(run: Run) -> Table:
    """Per site: organs, subjects, loss in its first and last round."""
    table = Table("site", "organs", _right("subjects"), _right("loss"), title=f"{run.config.name}: sites")
    for site in run.site_names:
        holdings = run.sites.get(site, {})
        subjects = holdings.get("subjects")
        _, losses = run.series(site, "loss")
        loss = f"{losses[0]:.3f} -> {losses[-1]:.3f}" if losses else "-"
        table.add_row(site, ", ".join(organs_of(holdings)), "-" if subjects is None else str(subjects), loss)
    return table


def score_table(probe: ProbeResult, metric: str) -> Table:
    """One row per arm, one column per label group; the interval beside the first, so that 80 columns hold it all (the
    HTML report has them all)."""
    groups = {score.group: score for score in probe.scores if score.metric == metric}
    words = {"auc": "AUC", "r2": "R2"}[metric]
    fit, test = (probe.subjects.get(part, 0) for part in ("fit", "test"))
    title = f"{words} of frozen features, {fit} subjects fitted, {test} held out (95 % interval)"
    table = Table(Column("features", no_wrap=True), *map(_right, groups), title=title)
    for arm in arms_of(probe, metric):
        first, *rest = (probe.find(arm, group, metric) for group in groups)
        table.add_row(
            arm, score_text(first), *(number_text(math.nan if score is None else score.value) for score in rest)
        )
    return table


def task_table(probe: ProbeResult) -> Table:
    """One row per model and place whose patients it predicts, one column per score with its 95 % interval."""
    metrics, rows = task_rows(probe)
    table = Table(Column("model", no_wrap=True), "patients", *map(_right, metrics))
    table.title = "Predictions of the task, of patients who were not trained on (95 % interval)"
    for row in rows:
        table.add_row(*row)
    return table


def task_rows(probe: ProbeResult) -> tuple[list[str], list[tuple[str, ...]]]:
    """Metrics of a task, and a row of each model and place: its arm, the place, a text for each metric."""
    metrics = list(dict.fromkeys(score.metric for score in probe.task))
    scores = {(score.arm, score.group, score.metric): score for score in probe.task}
    places = dict.fromkeys((score.arm, score.group) for score in probe.task)
    rows = [(*place, *(score_text(scores.get((*place, metric))) for metric in metrics)) for place in places]
    return metrics, rows


def benefit_lines(probe: ProbeResult) -> Iterator[str]:
    """Yield a sentence per site on which model predicts its own patients better: the run's or the site's own."""
    for score in probe.task:
        if not score.arm.endswith(GAIN):
            continue
        site, ours = score.group.removeprefix("site:"), _TASK_WORDS[score.arm.removesuffix(GAIN)]
        told = _gain_text(score)
        if math.isnan(score.value):
            yield f"{site}: its patients outside training are too few, or of one class, to compare {ours} with its own."
        elif score.low > 0:
            yield f"{site}: {ours} predicts its patients better than its own ({told}); keep it."
        elif score.high < 0:
            yield f"{site}: its own model predicts its patients better than {ours} ({told}); keep its own."
        else:
            yield f"{site}: {ours} and its own model cannot be told apart on its patients ({told})."


def contract_lines(probe: ProbeResult) -> Iterator[str]:
    """Yield a sentence per site on which model to keep, by linear probes of its own labels on its own patients."""
    gains = {(score.group, score.arm): score for score in probe.benefit if score.arm.endswith(GAIN)}
    for group in dict.fromkeys(score.group for score in probe.benefit):
        site = group.removeprefix("site:")
        offered = [(arm, gains[group, f"{arm}{GAIN}"]) for arm in _KEPT if (group, f"{arm}{GAIN}") in gains]
        better = [(arm, gain) for arm, gain in offered if gain.low > 0]
        arm, gain = max(better, key=lambda one: one[1].value) if better else offered[0]
        told = _gain_text(gain)
        if better:
            yield f"{site}: keep {_KEPT[arm]}: {told} over its own."
        elif gain.high < 0:
            yield f"{site}: keep its own model: {_KEPT[arm]} has {told} against it."
        else:
            yield f"{site}: no difference shown between {_KEPT[arm]} and its own ({told})."


def contract_table(probe: ProbeResult) -> Table:
    """One row per site, one column per model that it could keep."""
    arms, rows = contract_rows(probe)
    table = Table("patients of", *map(_right, arms), title="Models on each site's own patients (95 % interval)")
    for row in rows:
        table.add_row(*row)
    return table


def contract_rows(probe: ProbeResult) -> tuple[list[str], list[tuple[str, ...]]]:
    """Models that sites could keep, `own` first, and a row of each site: its name, a text for each model."""
    scores = {
        (score.group, "own" if score.arm == score.group else score.arm): score
        for score in probe.benefit
        if not score.arm.endswith(GAIN)
    }
    arms = list(dict.fromkeys(arm for _, arm in scores))
    sites = dict.fromkeys(group for group, _ in scores)
    rows = [(site.removeprefix("site:"), *(score_text(scores.get((site, arm))) for arm in arms)) for site in sites]
    return arms, rows


def label_table(probe: ProbeResult) -> Table:
    """One row per label: its subjects, and the scores of the federated and untrained models and of plain statistics."""
    arms = [arm for arm in _LABEL_ARMS if any(score.arm == arm for score in probe.labels)]
    table = Table(Column("label", no_wrap=True), "", _right("fit"), _right("test"), *map(_right, arms))
    table.title = "Every label, and the subjects for whom it is known"
    for label, metric, cells in label_rows(probe, arms):
        known = probe.known.get(label, {})
        table.add_row(label, metric, str(known.get("fit", "-")), str(known.get("test", "-")), *cells)
    return table


def label_rows(probe: ProbeResult, arms: Sequence[str]) -> Iterator[tuple[str, str, list[str]]]:
    """Label, metric, and the scores of some arms, the first with its interval."""
    by_cell = {(score.group, score.arm): score for score in probe.labels}
    for label, metric in dict.fromkeys((score.group, score.metric) for score in probe.labels):
        first, *rest = (by_cell.get((label, arm)) for arm in arms)
        values = [number_text(math.nan if score is None else score.value) for score in rest]
        yield label, {"auc": "AUC", "r2": "R2"}[metric], [score_text(first), *values]


def unmatched_lines(probe: ProbeResult) -> list[str]:
    """One line for each place whose label table and images do not tell of the same subjects."""
    return [
        f"{place}: {counted(counts.get('without_row', 0), 'subject')} with images and no row in the label table, "
        f"{counted(counts.get('without_images', 0), 'row')} without an image of the run"
        for place, counts in probe.unmatched.items()
        if any(counts.values())
    ]


def missing_table(missing: Mapping[str, Mapping[str, float]]) -> Table:
    """AUC with organs missing: one row per arm, one column per number of missing organs."""
    counts = missing_counts(missing)
    table = Table("organs missing", *(_right(str(count)) for count in counts), _right("dominant"), title="AUC")
    for arm, grid in missing.items():
        cells = [grid.get(f"auc_missing_{count}" if count else "auc", math.nan) for count in counts]
        table.add_row(arm, *map(number_text, [*cells, grid.get("auc_no_dominant", math.nan)]))
    return table


def few_labels_table(few_labels: Mapping[str, Mapping[str, float]]) -> Table:
    """AUC of probes fitted on few patients: one row per arm, one column per number of patients."""
    metrics = list(dict.fromkeys(metric for row in few_labels.values() for metric in row))
    table = Table("labelled patients", *(_right(metric.removeprefix("auc_")) for metric in metrics), title="AUC")
    for arm, row in few_labels.items():
        table.add_row(arm, *(number_text(row.get(metric, math.nan)) for metric in metrics))
    return table


def summary(probe: ProbeResult) -> list[str]:
    """What the tables say of the federation, a sentence for all labels and one for each smaller number of labels; none
    where there is no federated model, no reference or no site alone."""
    arms = arms_of(probe, "auc")
    sentences = [_compared("With all labels", {arm: probe.value(arm) for arm in arms})]
    if sentences[0]:
        sentences.append(_uncertain(probe, arms))
    for metric in dict.fromkeys(metric for row in probe.few_labels.values() for metric in row):
        values = {arm: probe.few_labels.get(arm, {}).get(metric, math.nan) for arm in arms}
        sentences.append(_compared(f"With labels of {metric.removeprefix('auc_')} patients", values))
    return [sentence for sentence in sentences if sentence]


def _compared(where: str, values: Mapping[str, float]) -> str:
    """A sentence on the federated model beside the better reference and the best site alone."""
    known = {arm: value for arm, value in values.items() if not math.isnan(value)}
    references = {arm: value for arm, value in known.items() if arm in ("untrained", "statistics")}
    sites = {arm: value for arm, value in known.items() if arm.startswith("site:")}
    if "federated" not in known or not references or not sites:
        return ""
    ours = known["federated"]
    reference, site = max(references, key=references.__getitem__), max(sites, key=sites.__getitem__)
    words = {"untrained": "the untrained model", "statistics": "plain statistics"}
    return (
        f"{where}, probes of the federated model reach an AUC of {number_text(ours)} on held-out patients: "
        f"{_signed(ours - known[reference])} against {words[reference]}, the better reference, and "
        f"{_signed(ours - known[site])} against the best site alone, {site.removeprefix('site:')}."
    )


def _uncertain(probe: ProbeResult, arms: Sequence[str]) -> str:
    """One sentence naming the models whose score lies in the federated model's interval; empty if there are none."""
    ours = probe.find("federated", "all", "auc")
    compared = [arm for arm in arms if arm in ("untrained", "statistics") or arm.startswith("site:")]
    within = [arm for arm in compared if ours and ours.low <= probe.value(arm) <= ours.high]
    if not ours or not within:
        return ""
    interval = f"{number_text(ours.low)} to {number_text(ours.high)}"
    return f"Its 95 % interval, {interval}, holds {', '.join(within)}: these patients are too few to tell them apart."


def _gain_text(gain: Score) -> str:
    """`AUC +.040 [+.010, +.070]`; without resamples there is no interval."""
    told = f"{gain.metric.upper()} {_signed(gain.value)}"
    return told if math.isnan(gain.low) else f"{told} [{_signed(gain.low)}, {_signed(gain.high)}]"


def _signed(value: float) -> str:
    return f"{'-' if round(value, 3) < 0 else '+'}{number_text(abs(value))}"


def stream_table(streams: Mapping[str, Mapping[str, float]]) -> Table:
    """AUC per stream: one row per stream, one column per arm."""
    table = Table("stream alone", *map(_right, streams), title="AUC")
    for stream in dict.fromkeys(name for row in streams.values() for name in row):
        table.add_row(stream, *(number_text(row.get(stream, math.nan)) for row in streams.values()))
    return table


def arms_of(probe: ProbeResult, metric: str) -> list[str]:
    """Arms that were scored, in their order."""
    return list(dict.fromkeys(score.arm for score in probe.scores if score.metric == metric))


def missing_counts(missing: Mapping[str, Mapping[str, float]]) -> Sequence[int]:
    """Numbers of missing organs that were tried, 0 first."""
    names = {name for grid in missing.values() for name in grid if name.startswith("auc_missing_")}
    return [0, *sorted(int(name.removeprefix("auc_missing_")) for name in names)]


def organs_of(holdings: Mapping[str, object]) -> list[str]:
    """Organs of a site's handshake."""
    streams = holdings.get("streams", {})
    return list(dict.fromkeys(parse_stream(stream)[0] for stream in streams)) if isinstance(streams, dict) else []


def score_text(score: Score | Leakage | None) -> str:
    """`.712 [.681, .744]`, or a dash."""
    if score is None or math.isnan(score.value):
        return "-"
    if math.isnan(score.low):
        return number_text(score.value)
    return f"{number_text(score.value)} [{number_text(score.low)}, {number_text(score.high)}]"


def number_text(value: float) -> str:
    """Three decimals without the zero before the point; a dash for NaN."""
    if math.isnan(value):
        return "-"
    return f"{value:.3f}".replace("0.", ".", 1) if abs(value) < 1 else f"{value:.3f}"


def _right(heading: str) -> Column:
    return Column(heading, justify="right", no_wrap=True)
