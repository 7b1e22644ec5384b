"""The report's figures. One colour per site throughout; a figure without data is left out."""

from panfm.extras import needs_extra
from panfm.report.console_tables import missing_counts
from panfm.report.run_files import Run

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
