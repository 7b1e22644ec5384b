"""Report sections about the rounds of a run: sites, learning curves, saliency, time, bytes, norms, privacy, cost."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from panfm.config.patient_dp import PatientDpConfig
from panfm.privacy.guarantees import privacy_label
from panfm.report.blocks import Details, Figure, Figures, Paragraph, Section, Table, absent
from panfm.report.charts import COLOURS, Line, Points, line_chart
from panfm.report.console_tables import organs_of
from panfm.report.run_files import Run
from panfm.report.status import clock, history, left_out, number, series

_MOST_PANELS = 12
_NO_ROUND = "No round is done yet."


def sites_section(run: Run) -> Section:
    """Make the section with each site's subjects, organs, rounds and loss, and its subjects with each stream."""
    rows = []
    for site in run.site_names:
        holdings = run.sites.get(site, {})
        rounds, losses = run.series(site, "loss")
        loss = f"{losses[0]:.3f} to {losses[-1]:.3f}" if losses else "-"
        subjects = holdings.get("subjects")
        rows.append(
            (site, ", ".join(organs_of(holdings)), "-" if subjects is None else str(subjects), str(len(rounds)), loss)
        )
    if not rows:
        return absent("sites", "Sites", "No site has joined yet.")
    table = Table(("site", "organs", "subjects", "rounds", "training loss, first to last"), rows, "Sites")
    return Section("sites", "Sites", [table, *_coverage(run)])


def _coverage(run: Run) -> list[Table]:
    if not run.sites:
        return []
    rows, shades = [], []
    most = max((count or 0 for site in run.sites.values() for count in site.get("streams", {}).values()), default=0)
    for stream in run.config.streams:
        by_site = [run.sites.get(site, {}).get("streams", {}) for site in run.site_names]
        rows.append((stream, *(_holders(streams, stream) for streams in by_site)))
        shades.append([(streams.get(stream) or 0) / (most or 1) for streams in by_site])
    return [Table(("stream", *run.site_names), rows, "Subjects with each stream; the darker, the more", shades)]


def _holders(streams: Mapping[str, int | None], stream: str) -> str:
    """Number of subjects with a stream; `some` if the site withholds it, a dot if the site lacks the stream."""
    return str(streams[stream] or "some") if stream in streams else "\N{MIDDLE DOT}"


def learning_section(run: Run) -> Section:
    """Make the section with loss curves of the federation and of each site."""
    key, title = "learning", "Learning curves"
    whole = list(series(run, "loss"))
    by_site = {site: [_points(run, site, "loss"), _points(run, site, "validation_loss")] for site in run.site_names}
    told: list[Points] = [whole, *(points for lines in by_site.values() for points in lines)]
    if not any(told):
        return absent(key, title, _NO_ROUND if not run.rounds else "No site reported its loss: it stays at the sites.")
    span = _span(told)
    panels: dict[str, list[Line]] = {"all sites, weighted mean": [Line(whole, "c0")]} if whole else {}
    panels |= {site: [Line(lines[0], "c0"), Line(lines[1], "c1 dashed")] for site, lines in by_site.items()}
    legend = [("c0", "training loss"), ("c1 dashed", "validation loss")]
    words = (
        "Loss of the pre-training task, by round. All charts have the same scale. Losses of sites with other organs "
        "are not comparable in height, only in shape."
    )
    return Section(key, title, [Paragraph(words), *_panels(panels, legend, "loss", ("training", "validation"), span)])


def saliency_section(run: Run) -> Section:
    """Make the section with the saliency of each stream by round."""
    key, title = "saliency", "Which organs the model looks at"
    profiles = [(line["round"], line["profile"]) for line in run.rounds if line.get("profile")]
    told = {site: zip(*run.series(site, "saliency"), strict=True) for site in run.site_names}
    by_site = {site: [(at, shares) for at, shares in pairs if len(shares) > 1] for site, pairs in told.items()}
    if not profiles and not any(by_site.values()):
        return absent(
            key,
            title,
            _NO_ROUND
            if not run.rounds
            else "No site reported saliency: it has one organ, its limits forbid it, or the model has no saliency.",
        )
    panels = {
        stream: [
            Line(_share(profiles, stream), "c0"),
            *(Line(_share(pairs, stream), "quiet thin") for pairs in by_site.values()),
        ]
        for stream in run.config.streams
    }
    panels = {stream: [line for line in lines if line.points] for stream, lines in panels.items()}
    panels = {stream: lines for stream, lines in panels.items() if lines}
    words = (
        "Saliency is the share of the model's attention that goes to an organ's image, in shares of an equal split: at "
        "1 an organ gets its fair share, at 2 twice as much. Only sites with several organs are counted."
    )
    span = _span([line.points for lines in panels.values() for line in lines])
    legend = [("c0", "all sites, weighted mean"), ("quiet thin", "single sites")]
    return Section(key, title, [Paragraph(words), *_panels(panels, legend, "saliency", ("all sites",), span)])


def exchange_section(run: Run) -> Section:
    """Make the section with seconds, bytes and update norms of the rounds."""
    key, title = "exchange", "Time, bytes and update norms"
    if not run.rounds:
        return absent(key, title, _NO_ROUND)
    sites = run.site_names
    seconds = {site: _points(run, site, "seconds") for site in sites}
    norms = {site: _norms(run, site) for site in sites}
    blocks: list[Paragraph | Table | Figures | Details] = [_site_totals(run)]
    blocks += [
        by_site_chart("Seconds of each round", "seconds", {"whole round": list(series(run, "seconds"))}),
        by_site_chart("Seconds until each site's reply", "seconds", seconds),
        by_site_chart("Length of each site's update", "length", norms),
        by_site_chart("Megabytes from each site", "MB", {site: _megabytes(run, site, "up") for site in sites}),
        by_site_chart("Megabytes to each site", "MB", {site: _megabytes(run, site, "down") for site in sites}),
    ]
    bytes_rows = [
        (group, *(f"{run.bytes_by_group(way).get(group, 0) / 1e6:.3f}" for way in ("up", "down")))
        for group in dict.fromkeys([*run.bytes_by_group("up"), *run.bytes_by_group("down")])
    ]
    if bytes_rows:
        blocks.append(
            Table(("group of parameters", "from the sites", "to the sites"), bytes_rows, "Megabytes over the whole run")
        )
    return Section(key, title, blocks)


def _site_totals(run: Run) -> Table:
    rows = []
    for site in run.site_names:
        seconds, norms = _points(run, site, "seconds"), _norms(run, site)
        rows.append((
            site, str(len(seconds)),
            clock(sum(value for _, value in seconds)) if seconds else "-",
            clock(max(value for _, value in seconds)) if seconds else "-",
            f"{norms[0][1]:.3g} to {norms[-1][1]:.3g}" if norms else "-",
            *(_total(_megabytes(run, site, way)) for way in ("up", "down")),
        ))  # fmt: skip
    headings = (
        "site", "replies", "time, all rounds", "slowest round", "length of the update, first to last", "MB from it",
        "MB to it",
    )  # fmt: skip
    caption = (
        "Sites: time from question to reply, length of their updates over all groups, megabytes of replies that count"
    )
    return Table(headings, rows, caption)


def _total(points: Points) -> str:
    return f"{sum(value for _, value in points):.3f}" if points else "-"


def left_out_section(run: Run) -> Section:
    """Make the section with sites left out of rounds, and rounds discarded by a gate, each with its reason."""
    rows = left_out(run)
    late = [(site, "late", f"round {line['round']}") for line in run.rounds for site in line.get("late", ())]
    if not rows and not late:
        return absent("left-out", "Left out, and why", "No site was left out of a round.")
    table = Table(
        ("site", "when", "why"), [*rows, *((site, when, why) for site, why, when in late)], "Left out of rounds"
    )
    return Section("left-out", "Left out, and why", [table])


def history_section(run: Run) -> Section | None:
    """Make the section with the last events of the run; None if it has noted none."""
    rows = history(run, most=100)
    if not rows:
        return None
    return Section("history", "History", [Table(("time", "round", "event", "site", "what"), rows, "Last events")])


def privacy_section(run: Run) -> Section:
    """Make the section with the privacy claim, and the epsilon that was planned and spent."""
    key, title = "privacy", "Privacy"
    label = privacy_label(run.config)
    if label == "none":
        return absent(key, title, "No differential privacy was asked for: no noise is added to what leaves a site.")
    private = run.config.patient_dp or run.config.site_dp
    assert private is not None
    costs = {
        site: [(line["round"], cost) for line in run.rounds if (cost := line.get("epsilon", {}).get(site)) is not None]
        for site in run.site_names
    }
    costs = {site: points for site, points in costs.items() if points}
    sentences = [
        f"Privacy: {label}.",
        f"Planned for the whole run: epsilon {private.epsilon:g} at delta {private.delta:g}.",
    ]
    blocks: list[Paragraph | Table | Figures | Details] = [Paragraph(sentence) for sentence in sentences]
    if costs:
        rows = [
            (site, number(points[-1][1], 3), f"{private.epsilon:g}", str(len(points))) for site, points in costs.items()
        ]
        unit = "spent so far, by the plan" if isinstance(private, PatientDpConfig) else "spent so far"
        blocks.append(Table(("site", f"epsilon {unit}", "planned", "rounds"), rows, "Epsilon by site"))
        blocks.append(by_site_chart("Epsilon by round", "epsilon", costs))
    blocks.append(Paragraph("Each site's ledger decides what was spent: panfm ledger show SITE.", is_quiet=True))
    return Section(key, title, blocks)


_WATTS_PER_CORE, _OVERHEAD = 12.0, 1.67


def cost_section(run: Run) -> Section:
    """Make the section with processor hours, and energy estimated by a formula whose assumptions it names."""
    key, title = "cost", "Cost"
    if not run.rounds:
        return absent(key, title, _NO_ROUND)
    waited = sum(value for site in run.site_names for _, value in _points(run, site, "seconds"))
    cost = run.data.cost
    if cost is None:
        measured = (
            f"Sites took {waited / 3600:.3f} hours from question to reply, all rounds and sites together; a core that "
            "is busy all that time is assumed."
        )
        seconds = waited
    else:
        measured = (
            f"{cost.cpu_seconds / 3600:.3f} CPU hours, measured: rounds and probes of this simulation, without what "
            "each site trains alone for comparison; of a resumed run, since it was resumed."
        )
        seconds = cost.cpu_seconds
    energy = seconds / 3600 * _WATTS_PER_CORE * _OVERHEAD / 1000
    formula = (
        f"Energy: about {energy:.2g} kWh = {seconds / 3600:.3f} h x {_WATTS_PER_CORE:g} W per busy core x "
        f"{_OVERHEAD:g} / 1000. Assumed: {_WATTS_PER_CORE:g} W for a core, and a data centre that uses {_OVERHEAD:g} "
        "times what its computers do (Green Algorithms, Lannelongue et al. 2021); memory, network and graphics cards "
        "are not counted."
    )
    gpu = (
        [Paragraph(f"A graphics card did part of the work: {cost.gpu}. Its energy comes on top.")]
        if cost and cost.gpu
        else []
    )
    return Section(key, title, [Paragraph(measured), Paragraph(formula), *gpu])


def _points(run: Run, site: str, key: str) -> list[tuple[float, float]]:
    return [(at, value) for at, value in zip(*run.series(site, key), strict=True) if math.isfinite(value)]


def _norms(run: Run, site: str) -> list[tuple[float, float]]:
    """(Round, L2 norm of a site's whole update); empty if the site withholds its norms."""
    pairs = zip(*run.series(site, "norms"), strict=True)
    return [(at, math.hypot(*(norm for norm in norms.values() if norm is not None))) for at, norms in pairs if norms]


def _megabytes(run: Run, site: str, way: str) -> list[tuple[float, float]]:
    """(Round, megabytes from a site or to it), way is `up` or `down`; empty in runs of versions that kept no bytes by
    site."""
    return [(at, value / 1e6) for at, value in _points(run, site, f"bytes_{way}")]


def _share(told: Iterable[tuple[int, Mapping[str, Any]]], stream: str) -> list[tuple[float, float]]:
    return [(at, shares[stream]) for at, shares in told if shares.get(stream) is not None]


def _span(lines: Sequence[Points]) -> tuple[float, float]:
    values = [value for points in lines for _, value in points if math.isfinite(value)]
    return min(values, default=0.0), max(values, default=1.0)


def _panels(
    panels: Mapping[str, Sequence[Line]],
    legend: Sequence[tuple[str, str]],
    y: str,
    columns: Sequence[str],
    span: tuple[float, float],
) -> list[Figures | Details]:
    """Draw one chart per name, all with the same scale; those after the first dozen are folded away."""
    figures = []
    for name, lines in panels.items():
        chart = line_chart(
            lines, x="round", y=y, words=f"{name}: {y} by round; the numbers are below the chart", span=span
        )
        if chart:
            figures.append(Figure(name, chart, numbers=_round_table(name, lines[: len(columns)], columns)))
    first, rest = figures[:_MOST_PANELS], figures[_MOST_PANELS:]
    more = [Details(f"{len(rest)} more", [Figures(rest, legend)])] if rest else []
    return [Figures(first, legend), *more]


def _round_table(name: str, lines: Sequence[Line], columns: Sequence[str]) -> Table:
    by_round = [dict(line.points) for line in lines]
    rounds = sorted({at for points in by_round for at in points})
    rows = [(f"{at:g}", *(_cell(points.get(at)) for points in by_round)) for at in _thinned(rounds)]
    return Table(("round", *columns[: len(lines)]), rows, name)


def _thinned(rounds: list[float]) -> list[float]:
    """Thin out rounds to at most twelve, the first and the last among them."""
    step = max(-(-(len(rounds) - 1) // 11), 1)
    return sorted({*rounds[::step], *rounds[-1:]})


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def by_site_chart(title: str, y: str, by_site: Mapping[str, Points]) -> Figures:
    """Draw one chart with a line per site, and a table of its numbers; coloured if there are colours for all sites."""
    told = {site: points for site, points in by_site.items() if points}
    has_colours = len(told) <= COLOURS
    styles = [f"c{number}" if has_colours else "quiet thin" for number in range(len(told))]
    lines = [Line(points, style) for points, style in zip(told.values(), styles, strict=True)]
    chart = line_chart(lines, x="round", y=y, words=f"{title}; the numbers are below the chart")
    numbers = _round_table(title, lines, list(told))
    legend = list(zip(styles, told, strict=True)) if has_colours and len(told) > 1 else []
    return Figures([Figure(title, chart, legend, numbers)] if chart else [])
