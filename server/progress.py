"""What the person who waits sees: the sites, then a line per round."""

from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Console

from panfm.config import RunConfig
from panfm.errors import one_line
from panfm.sharing.messages import Handshake


class Progress:
    """Plain lines on a console."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(soft_wrap=True, highlight=False)

    def site(self, handshake: Handshake) -> None:
        """A site takes part, with this."""
        streams = ", ".join(f"{stream} {count or ''}".strip() for stream, count in handshake.streams.items())
        self._console.print(f"{handshake.site}: {handshake.subjects or 'withheld number of'} subjects: {streams}")

    def privacy(self, label: str) -> None:
        """What the run may say of its privacy."""
        self._console.print(f"privacy: {label}", markup=False)

    def absent(self, reasons: Iterable[str]) -> None:
        """These cannot take part; the run goes on without them."""
        for reason in reasons:
            self._note(f"left out: {reason}")

    def round(self, run: RunConfig, line: Mapping[str, Any]) -> None:
        """How a round went."""
        loss = "-" if line["loss"] is None else f"{line['loss']:.4f}"
        megabytes = sum(line["bytes_up"].values()) / 1e6
        self._console.print(
            f"round {line['round']}/{run.train.rounds}  loss {loss}  {len(line['sites'])} sites"
            f"  {line['seconds']:.1f} s  {megabytes:.1f} MB up{_epsilon(line)}"
        )
        for site, reason in line["rejected"].items():
            self._note(f"round {line['round']}: {site} left out: {reason}")
        for site, reason in [*line.get("away", {}).items(), *line.get("moved", {}).items()]:
            self._note(f"round {line['round']}: {site} {reason}")

    def _note(self, words: str) -> None:
        self._console.print(one_line(words), style="yellow", markup=False)


def _epsilon(line: Mapping[str, Any]) -> str:
    """The largest planned cost of a site so far, in a private run."""
    costs = [cost for cost in line.get("epsilon", {}).values() if cost is not None]
    return f"  epsilon {max(costs):.3f}" if costs else ""
