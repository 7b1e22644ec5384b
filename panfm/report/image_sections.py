"""Report sections about patients' images, from `report.json`, which a simulation writes at its end."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from panfm.privacy.guarantees import privacy_label
from panfm.report.blocks import Figure, Figures, Paragraph, Picture, PictureRow, Pictures, Section, Table, absent
from panfm.report.charts import COLOURS, mark_style, scatter
from panfm.report.report_data import EmbeddingMap, Example
from panfm.report.run_files import Run

_NO_IMAGES = (
    "Needs patients' images, which this folder's run did not have in one place: a simulation with a hold-out keeps "
    "them in report.json at its end."
)
_MOST_CLASSES = 2 * COLOURS
_UNNOISED = (
    "Made from the images themselves, without noise: a simulation has them in one place, and the privacy claim does "
    "not cover this section."
)


def embedding_section(run: Run) -> Section:
    """Make the section with embeddings in two dimensions, coloured by site, organs and labels."""
    key, title = "embedding", "Map of the embeddings"
    points = run.data.embedding
    if points is None:
        return absent(key, title, _NO_IMAGES)
    words = (
        f"{len(points.pca)} subjects, one point each: subjects with similar embeddings lie close together. Principal "
        "components keep distances; t-SNE keeps neighbours, so that sizes and gaps of its groups mean nothing. Points "
        "that group by site or by organs show what the model has learned of how images were taken, not of disease."
    )
    answers = {0: "no", 1: "yes"}
    colourings: dict[str, list[str]] = {"site": list(points.sites), "organs": list(points.organs)}
    for label, values in points.labels.items():
        colourings[f"label {label}"] = ["" if value is None else answers.get(value, str(value)) for value in values]
    rows = [_coloured(points, name, values) for name, values in colourings.items()]
    return Section(key, title, [Paragraph(words), *_claim(run), *rows])


def _claim(run: Run) -> list[Paragraph]:
    return [] if privacy_label(run.config) == "none" else [Paragraph(_UNNOISED)]


def _coloured(points: EmbeddingMap, name: str, values: Sequence[str]) -> Figures:
    """Draw both layouts (PCA and t-SNE), coloured by one property; subjects with rare or unknown values are grey."""
    counts = Counter(value for value in values if value)
    kept = sorted(value for value, _ in counts.most_common(_MOST_CLASSES))
    numbers = [kept.index(value) if value in kept else -1 for value in values]
    legend = [(mark_style(number), f"{value} ({counts[value]})") for number, value in enumerate(kept)]
    if rest := numbers.count(-1):
        legend.append(("dots none", f"others, or not known ({rest})"))
    first, second = points.explained
    axes = (f"first component, {first:.0%} of variance", f"second, {second:.0%}")
    shown = ", ".join(words for _, words in legend)
    pca = scatter(points.pca, numbers, x=axes[0], y=axes[1], words=f"Principal components, coloured by {name}: {shown}")
    tsne = scatter(points.tsne, numbers, x="t-SNE 1", y="t-SNE 2", words=f"t-SNE, coloured by {name}: {shown}")
    figures = [Figure(f"Principal components, by {name}", pca), Figure(f"t-SNE, by {name}", tsne)]
    return Figures(figures, legend)


def examples_section(run: Run) -> Section:
    """Make the section with slices of held-out images: unchanged, with hidden patches, and as predicted."""
    key, title = "examples", "Example slices: input, mask, prediction"
    examples = run.data.examples
    if examples is None:
        return absent(key, title, _NO_IMAGES)
    words = f"Middle slices of held-out patients; {examples.hidden:.0%} of the patches are hidden (blue), at random."
    if examples.fitted:
        words += (
            f" The model predicts features, not pixels: a linear read-out, fitted on {examples.fitted} training "
            "subjects, turns them into pixels, as the mean patch at the place plus what the features tell. The share "
            "in brackets is by how much the squared error on held-out patients falls below that of the mean patch "
            "alone; at 0% the features tell nothing of the pixels."
        )
    else:
        words += " This run's shared model predicts no hidden patches, so there is no third picture."
    rows = [PictureRow(_row_title(row, examples.error), list(_pictures(row))) for row in examples.rows]
    return Section(key, title, [Paragraph(words), *_claim(run), Pictures(rows)])


def _row_title(row: Example, error: Mapping[str, tuple[float, float]]) -> str:
    if row.stream not in error:
        return row.stream
    ours, mean = error[row.stream]
    share = round(1 - ours / mean, 2) + 0.0 if mean else 0.0  # no minus before a 0
    return f"{row.stream} ({share:.0%})"


def _pictures(row: Example) -> Iterable[tuple[str, Picture]]:
    for caption, png in (("input", row.input), ("mask", row.masked), ("prediction", row.prediction)):
        if png is not None:
            yield caption, Picture(png, f"{row.stream}, {caption}")


def experts_section(run: Run) -> Section | None:
    """Make the section with each expert's share in a stream's images; None for a model without experts."""
    if run.config.model.backbone != "director-experts":
        return None
    key, title = "experts", "Which expert reads which modality"
    experts = run.data.experts
    if experts is None:
        return absent(key, title, _NO_IMAGES)
    words = (
        f"Share of each expert in the gates of a stream's images, in the last layer ({experts.layer}); a row adds up "
        "to 1. Where experts stay at their sites, equal numbers at two sites are different experts."
    )
    has_sites = any(row.site for row in experts.rows)
    names = [f"{row.stream}, {row.site}" if has_sites else row.stream for row in experts.rows]
    rows = [(name, *(f"{share:.2f}" for share in row.shares)) for name, row in zip(names, experts.rows, strict=True)]
    count = max(len(row.shares) for row in experts.rows)
    headings = ("stream, site" if has_sites else "stream", *(f"expert {number}" for number in range(1, count + 1)))
    shades = [list(row.shares) for row in experts.rows]
    return Section(
        key, title, [Paragraph(words), Table(headings, rows, "Experts by stream; the darker, the more", shades)]
    )
