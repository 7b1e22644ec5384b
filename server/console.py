"""Output of a run on a terminal: a line for each round, one screen of its state, and both while it goes on.

Sites' words are shown as plain text, without markup or escape codes.
"""

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Column, Table
from rich.text import Text

from panfm.config import experiment_hash
from panfm.errors import RunError, one_line
from panfm.report.run_files import Run, read_run
from panfm.report.site_evaluation import SiteEvaluation
from panfm.report.status import (
    gate_line,
    headline,
    history,
    left_out,
    number,
    privacy_line,
    site_statuses,
    stream_statuses,
)
from panfm.sharing.messages import Handshake
from server.flower_cli import FlowerRun

if TYPE_CHECKING:
    from server.label_probe import LabelProbes

logger = logging.getLogger(__name__)
View = Callable[[Run], None]
_MOST_LEFT_OUT = 6
_MOST_EVENTS = 6
_POLL_S = 1.0
_STATUS_S = 10.0
"""A look at Flower's status costs a process; the rounds are read from the run folder meanwhile."""
_SILENCE_S = 600.0
"""A SuperLink that has not answered for so long, with no round done either, is taken for gone."""


class Progress:
    """Plain lines on a console: the sites, then one for each round."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(soft_wrap=True, highlight=False)

    def site(self, handshake: Handshake) -> None:
        """Print a site that takes part, and what it has."""
        streams = ", ".join(f"{stream} {count or ''}".strip() for stream, count in handshake.streams.items())
        self._console.print(f"{handshake.site}: {handshake.subjects or 'withheld number of'} subjects: {streams}")

    def privacy(self, label: str) -> None:
        """Print what the run may claim of its privacy."""
        self._console.print(f"privacy: {label}", markup=False)

    def absent(self, reasons: Iterable[str]) -> None:
        """Print why nodes cannot take part; the run goes on without them."""
        for reason in reasons:
            self._note(f"left out: {reason}")

    def round(self, num_rounds: int, line: Mapping[str, Any]) -> None:
        """Print how a round went."""
        loss = "-" if line["loss"] is None else f"{line['loss']:.4f}"
        megabytes = sum(line["bytes_up"].values()) / 1e6
        self._console.print(
            f"round {line['round']}/{num_rounds}  loss {loss}  {len(line['sites'])} sites"
            f"  {line['seconds']:.1f} s  {megabytes:.1f} MB up{_epsilon(line)}"
        )
        if gate := line.get("gate"):
            self._gate(line["round"], gate)
        self._faults(line)
        for site, reason in line["rejected"].items():
            self._note(f"round {line['round']}: {site} left out: {reason}")
        for site, reason in [*line.get("away", {}).items(), *line.get("moved", {}).items()]:
            self._note(f"round {line['round']}: {site} {reason}")

    def probes(self, probes: "LabelProbes") -> None:
        """Print the probes of labels that all sites' patients gave, and what is left out."""
        for task, shared in probes.probes.items():
            known = [value for value in shared.r2 if not math.isnan(value)]
            r2 = f"{sum(known) / len(known):.3f}" if known else "-"
            sites = f"{len(shared.sites)} site" + "s" * (len(shared.sites) > 1)
            self._console.print(
                f"probe {task}: {shared.patients} patients of {sites}, leave-one-out R2 {r2}", markup=False
            )
        for name, reason in probes.failed.items():
            self._note(f"probe: {name} left out: {reason}")

    def _gate(self, round_number: int, gate: Mapping[str, Any]) -> None:
        """Print whether a round was kept, and by which measure."""
        compared = f"measure {number(gate['measure'], 4)}, before {number(gate['before'], 4)}"
        self._console.print(f"round {round_number}: {'kept' if gate['kept'] else 'not kept'}: {compared}")
        for site, reason in gate["missing"].items():
            self._note(f"round {round_number}: {site} is not in the measure: {reason}")

    def _faults(self, line: Mapping[str, Any]) -> None:
        """Print which monitors of sites have gone wrong."""
        for wrong in line.get("faults", {}).values():
            for words in wrong.values():
                self._note(words)

    def _note(self, words: str) -> None:
        self._console.print(one_line(words), style="yellow", markup=False)


def _epsilon(line: Mapping[str, Any]) -> str:
    """Largest planned cost of a site so far, in a private run."""
    costs = [cost for cost in line.get("epsilon", {}).values() if cost is not None]
    return f"  epsilon {max(costs):.3f}" if costs else ""


def screen(run: Run) -> RenderableType:
    """One screen of a run: rounds done, sites, streams, and who was left out."""
    parts: list[RenderableType] = [
        _text(f"{run.config.name}: {headline(run)}", style="bold"),
        _text(f"experiment {experiment_hash(run.config)}"),
        _site_table(run),
        _stream_table(run),
    ]
    if privacy := privacy_line(run):
        parts.append(_text(privacy))
    if gate := gate_line(run):
        parts.append(_text(gate))
    parts += [_text(line, style="cyan") for line in (run.progress.lines() if run.progress else ())]
    for site, rounds, reason in left_out(run, _MOST_LEFT_OUT):
        parts.append(_text(f"{rounds}: {site} {reason}" if site else f"{rounds}: {reason}", style="yellow"))
    parts += [_text(" ".join(filter(None, event))) for event in reversed(history(run, _MOST_EVENTS))]
    return Group(*parts)


def evaluation_table(evaluation: SiteEvaluation) -> Table:
    """Scores of a run's model on the sites' own labels."""
    table = Table("column", "site", "score", _right("patients"), "scored on")
    for row in evaluation.rows():
        table.add_row(*map(_text, row))
    return table


def _site_table(run: Run) -> Table:
    statuses = site_statuses(run)
    is_private = any(status.epsilon is not None for status in statuses)
    table = Table("site", *map(_right, ("subjects", "rounds", "seconds", "loss", *(["epsilon"] if is_private else []))))
    table.add_column("last round", ratio=1)
    for status in statuses:
        numbers = [
            "-" if status.subjects is None else str(status.subjects),
            f"{status.answered}/{status.asked}",
            number(status.seconds, 1),
            number(status.loss, 4),
            *([number(status.epsilon, 3)] if is_private else []),
        ]
        table.add_row(_text(status.site), *numbers, _text(status.now))
    return table


def _stream_table(run: Run) -> Table:
    table = Table("stream", *map(_right, ("held by", "trained by", "last round", "saliency")))
    for status in stream_statuses(run):
        table.add_row(
            _text(status.stream),
            str(len(status.holders)),
            str(len(status.trained_by)),
            "-" if status.last_round is None else str(status.last_round),
            number(status.saliency, 2),
        )
    return table


def _text(words: str, style: str = "") -> Text:
    return Text(one_line(words), style=style)


def _right(heading: str) -> Column:
    return Column(heading, justify="right", no_wrap=True)


class Lines:
    """A view that prints a line for each round, and one for each site that it had to do without."""

    def __init__(self, console: Console | None = None) -> None:
        self._progress = Progress(console)
        self._shown = 0

    def __call__(self, run: Run) -> None:
        """Print the new rounds."""
        for line in run.rounds[self._shown :]:
            self._progress.round(run.config.train.rounds, line)
        self._shown = len(run.rounds)


@contextmanager
def view(console: Console) -> Iterator[View]:
    """A live screen on a terminal, plain lines elsewhere."""
    if not console.is_terminal:
        yield Lines(console)
        return
    with Live(console=console, auto_refresh=False) as live:
        yield lambda run: live.update(screen(run), refresh=True)


def follow(run_dir: Path, show: View, flower: FlowerRun | None, environment: Mapping[str, str]) -> None:
    """Show a run until it has ended.

    Args:
        flower: Where Flower runs it; None: it is watched as long as a process is at work in the folder.
    Raises:
        RunError: it ended without doing what was asked; the line says why.
    """
    status, details, rounds = "", "", 0
    asked = answered = time.monotonic()
    while True:
        run = read_run(run_dir)
        show(run)
        if len(run.rounds) > rounds:
            rounds, answered = len(run.rounds), time.monotonic()
        if flower is None:
            if not run.is_at_work:
                break
        elif (run.is_finished and not run.is_at_work) or time.monotonic() - asked > _STATUS_S:
            asked = time.monotonic()
            try:
                status, details = flower.entry(environment)
            except RunError as error:
                if not run.is_at_work or asked - answered > _SILENCE_S:
                    raise
                logger.warning("%s; the run goes on", error)
                continue
            answered = asked
            if status.startswith("finished"):
                break
        time.sleep(_POLL_S)
    show(run := read_run(run_dir))
    if not run.is_finished or (flower and status != "finished:completed"):
        raise RunError(f"{run_dir}: {why_not_finished(run, status, details)}")


def why_not_finished(run: Run, status: str = "", details: str = "") -> str:
    """Tell in one line why a run has not finished, by the run folder or else by Flower."""
    done = f"after {len(run.rounds)} of {run.config.train.rounds} rounds"
    if run.failure:
        return f"{run.ending} {done}: {run.failure}"
    return f"{run.state} {done}" + (f"; Flower: {status}: {details}" if status else "")
