"""Report sections with probe scores of the model's features: by label, with few labels, by missing organ, by stream."""

import math
from collections.abc import Mapping

from panfm.evaluate.result import ProbeResult
from panfm.report.blocks import Details, Figure, Figures, Paragraph, Section, Table, absent
from panfm.report.charts import COLOURS, Line, line_chart
from panfm.report.console_tables import (
    arms_of,
    benefit_lines,
    contract_lines,
    contract_rows,
    label_rows,
    missing_counts,
    number_text,
    score_text,
    task_rows,
    unmatched_lines,
)
from panfm.report.run_files import Run
from panfm.report.verdict import OURS, arm_words, best_site, main_scores

NOT_SCORED = (
    "The run has no scores of held-out patients: a simulation makes them at its end, from a hold-out with labels."
)


def task_section(run: Run) -> Section | None:
    """Make the section with predictions of the run's `[task]`; None if the run has learned none."""
    if run.config.task is None:
        return None
    key, title = "task", f"Predictions of {run.config.task.label}"
    if run.probe is None or not run.probe.task:
        return absent(key, title, NOT_SCORED)
    metrics, rows = task_rows(run.probe)
    words = (
        "Patients on whom nobody was trained: the hold-out, and those of each site outside its split train. "
        "Each site's own model has learned from its labels alone, with as many steps."
    )
    told = [(arm_words(arm), place, *cells) for arm, place, *cells in rows]
    caption = "Scores of the head that the run trained, with 95 % intervals by patient"
    table = Table(("model", "patients", *metrics), told, caption)
    return Section(key, title, [Paragraph(words), *map(Paragraph, benefit_lines(run.probe)), table])


def evaluation_section(run: Run) -> Section | None:
    """Make the section with the sites' scores of the model on their own labels; None if nobody has asked for them."""
    if not run.evaluation.columns:
        return None
    words = (
        "Each site has scored the final model on its own labels and told no more than this: on held-out patients, or, "
        "where none are held out, by cross-validation of a linear probe of its own."
    )
    headings = ("column", "site", "score", "patients", "scored on")
    table = Table(headings, run.evaluation.rows(), "Scores at the sites, with 95 % intervals by patient")
    left_out = [Paragraph(f"left out: {line}", is_quiet=True) for line in run.evaluation.left_out()]
    return Section("evaluation", "Evaluation at the sites", [Paragraph(words), table, *left_out])


def label_section(run: Run) -> Section:
    """Make the section with every label's scores and number of subjects; tables of all models are folded away."""
    key, title = "labels", "Label by label"
    if run.probe is None:
        return absent(key, title, NOT_SCORED)
    probe = run.probe
    counts = f"{probe.subjects.get('fit', 0)} subjects fitted, {probe.subjects.get('test', 0)} held out."
    labels = list(dict.fromkeys(score.arm for score in probe.labels))
    best = best_site(main_scores(probe))
    main = [arm for arm in labels if not arm.startswith("site:") or (best and arm == best.arm)]
    blocks: list[Paragraph | Table | Details] = [Paragraph(counts)]
    if labels:
        blocks.append(_label_table(probe, main))
    else:
        blocks.append(Paragraph("This run kept no scores of single labels.", is_quiet=True))
    tables = [*_group_tables(probe)]
    if main != labels:
        tables.append(_label_table(probe, labels))
    if tables:
        blocks.append(Details("Every model, by group of labels and label by label", tables))
    notes = [*unmatched_lines(probe), *probe.notes]
    if notes:
        blocks.append(Details(f"Notes on the probes ({len(notes)})", [Paragraph(note) for note in notes]))
    return Section(key, title, blocks)


def _label_table(probe: ProbeResult, arms: list[str]) -> Table:
    ordered = [arm for arm in (OURS,) if arm in arms] + [arm for arm in arms if arm != OURS]
    known = probe.known
    rows = [
        (label, *cells, metric, *(str(known.get(label, {}).get(side, "-")) for side in ("fit", "test")))
        for label, metric, cells in label_rows(probe, ordered)
    ]
    headings = ("label", *map(arm_words, ordered), "score", "fitted", "held out")
    return Table(headings, rows, "Scores of every label, and the subjects for whom it is known")


def _group_tables(probe: ProbeResult) -> list[Table]:
    """Make one table per metric: a row per model, a column per group of labels."""
    tables = []
    for metric, words in (("auc", "AUC"), ("r2", "R2")):
        groups = list(dict.fromkeys(score.group for score in probe.scores if score.metric == metric))
        rows = [
            (arm_words(arm), *(score_text(probe.find(arm, group, metric)) for group in groups))
            for arm in arms_of(probe, metric)
        ]
        if groups:
            tables.append(Table(("model", *groups), rows, f"{words} by group of labels"))
    return tables


def contract_section(run: Run) -> Section | None:
    """Make the section with the model that each site should keep; None if the run has no such scores."""
    if run.probe is None or not run.probe.benefit:
        return None
    words = (
        "A linear probe of each site's own labels reads every model that the site could keep, and is scored on the "
        "site's patients outside its split train, or across its patients where there are none. A model is to be kept "
        "if its gain over the site's own lies above 0 with all of its interval, on the same patients."
    )
    arms, rows = contract_rows(run.probe)
    table = Table(("patients of", *map(arm_words, arms)), rows, "Models on each site's own patients, 95 % intervals")
    sentences = map(Paragraph, contract_lines(run.probe))
    return Section("contract", "What each site should keep", [Paragraph(words), *sentences, table])


def few_labels_section(run: Run) -> Section | None:
    """Make the section with scores of probes fitted on few patients; None if the run has no such scores."""
    few = run.probe.few_labels if run.probe else {}
    metrics = list(dict.fromkeys(metric for row in few.values() for metric in row))
    if not metrics:
        return None
    rows = [
        (arm_words(arm), *(number_text(row.get(metric, math.nan)) for metric in metrics)) for arm, row in few.items()
    ]
    headings = ("model", *(f"{metric.removeprefix('auc_')} labelled" for metric in metrics))
    words = "Mean AUC of probes that learn from the labels of only so many patients, drawn at random from all sites."
    return Section("few-labels", "With few labels", [Paragraph(words), Table(headings, rows, "AUC with few labels")])


def missing_section(run: Run) -> Section:
    """Make the section with AUC by number of missing organs, and the AUC lost without each organ."""
    key, title = "missing-organs", "When organs are missing"
    missing = run.probe.missing if run.probe else {}
    counts = missing_counts(missing)
    if len(counts) < 2:
        reason = (
            NOT_SCORED if run.probe is None else "Held-out patients have one organ each, so none can be taken away."
        )
        return absent(key, title, reason)
    words = "Organs are taken away from held-out patients; the probe stays as it was fitted."
    curves = {arm: missing_curve(grid) for arm, grid in missing.items()}
    dominant = {arm: number_text(grid.get("auc_no_dominant", math.nan)) for arm, grid in missing.items()}
    table = Table(
        ("model", *(str(count) for count in counts), "without the dominant organs"),
        [
            (arm_words(arm), *(number_text(value) for _, value in points), dominant[arm])
            for arm, points in curves.items()
        ],
        "AUC by number of organs missing",
    )  # fmt: skip
    styles = [f"c{number}" if number < COLOURS else "quiet thin" for number in range(len(curves))]
    lines = [Line(points, style) for points, style in zip(curves.values(), styles, strict=True)]
    chart = line_chart(
        lines, x="organs missing", y="AUC", words="AUC by number of organs missing; the table has the numbers"
    )
    legend = [(style, arm_words(arm)) for style, arm in zip(styles, curves, strict=True)]
    figures = [Figure("All held-out patients", chart, numbers=table)] if chart else []
    blocks: list[Paragraph | Table | Figures] = [Paragraph(words), Figures(figures, legend)]
    if drops := _drops(missing):
        blocks.append(drops)
    return Section(key, title, blocks)


def missing_curve(grid: Mapping[str, float]) -> list[tuple[int, float]]:
    """(Number of missing organs, AUC) of one model, from its entry under `missing` in probe.json."""
    counts = missing_counts({"": grid}) if grid else []
    return [(count, grid.get(f"auc_missing_{count}" if count else "auc", math.nan)) for count in counts]


def _drops(missing: Mapping[str, Mapping[str, float]]) -> Table | None:
    """Make the table of the AUC that each model loses without each organ; larger losses have darker cells."""
    prefix = "auc_drop_"
    organs = list(
        dict.fromkeys(
            name.removeprefix(prefix) for grid in missing.values() for name in grid if name.startswith(prefix)
        )
    )
    values = [[grid.get(prefix + organ, math.nan) for organ in organs] for grid in missing.values()]
    most = max((value for row in values for value in row if 0 < value < math.inf), default=1.0)
    shades = [[max(value, 0.0) / most if math.isfinite(value) else 0.0 for value in row] for row in values]
    rows = [(arm_words(arm), *map(number_text, row)) for arm, row in zip(missing, values, strict=True)]
    return (
        Table(("model", *organs), rows, "AUC lost without one organ; the darker, the more", shades) if organs else None
    )


def streams_section(run: Run) -> Section | None:
    """Make the section with AUCs of probes on one stream alone; None if patients have several streams."""
    by_arm = run.probe.streams if run.probe else {}
    names = list(dict.fromkeys(name for row in by_arm.values() for name in row))
    if not names:
        return None
    rows = [(name, *(number_text(row.get(name, math.nan)) for row in by_arm.values())) for name in names]
    words = "A probe is fitted and scored on the patients of one stream alone."
    return Section(
        "streams",
        "Stream by stream",
        [Paragraph(words), Table(("stream", *map(arm_words, by_arm)), rows, "AUC of each stream alone")],
    )


def shared_probe_section(run: Run) -> Section | None:
    """Make the section with probes fitted at the run's end on summed statistics of all sites; None without them."""
    told = run.metadata.get("probe", {})
    rows = [
        (
            task,
            str(probe["patients"]),
            "all" if set(probe["sites"]) == set(run.site_names) else ", ".join(probe["sites"]),
            " ".join(number_text(math.nan if value is None else value) for value in probe["r2"]),
        )
        for task, probe in told.get("tasks", {}).items()
    ]
    left_out = [
        Paragraph(f"{name} (left out): {reason}", is_quiet=True) for name, reason in told.get("left-out", {}).items()
    ]
    table = (
        [Table(("task", "patients", "sites", "R2, leaving one patient out"), rows, "Probes from summed statistics")]
        if rows
        else []
    )
    return (
        Section("shared-probes", "Probes from the labels of all sites", [*table, *left_out])
        if table or left_out
        else None
    )
