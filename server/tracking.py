"""Status page and loggers of a run's rounds, kept while it goes on.

The page is made from rounds.jsonl, so a resumed run shows every round once. No run depends on a logger: if
the disk is full or a library fails, a line in the log says so.

To add a logger, write a class with the methods of `RoundLogger` and a line in `LOGGERS` (tracking_config.py), or an
entry point of the group `panfm.loggers`. Sites send no images: the only ones that a logger is given are those that a
simulation makes from its owner's data.
"""

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import Any, Protocol, Self

from panfm.errors import PanfmError, one_line
from panfm.report.status_page import write_status
from server.run_folder import RunFolder
from server.tracking_config import LOGGERS, tracking_of

logger = logging.getLogger(__name__)
_PAGE_EVERY_S = 5.0
"""Rounds of a simulation may take milliseconds; nobody sees that many pages. Those of real sites take longer."""


class RoundLogger(Protocol):
    """Shows the rounds of a run somewhere, or does anything else after each of them. It may raise any error."""

    def __init__(self, folder: RunFolder, run_id: str) -> None:
        """Begin; where the run is resumed, with the rounds that the run folder has."""

    def add(self, line: Mapping[str, Any]) -> None:
        """Add a round that has ended: its line of rounds.jsonl (`scalars` are its numbers)."""

    def add_images(self, round_number: int, images: Mapping[str, bytes]) -> None:
        """Add images of the model after a round: PNG files by name. A logger without this method gets none."""

    def close(self) -> None:
        """End, when the run has ended or was interrupted."""


class Tracking:
    """Status page and loggers of one run; a context that closes the loggers at its end."""

    def __init__(self, folder: RunFolder, run_id: str = "") -> None:
        """Write the page anew, with the rounds done before, and begin the loggers of the run's `[tracking]`.

        Raises:
            ConfigError: the table does not hold.
        """
        self._folder = folder
        self._page_at = 0.0
        self._loggers: dict[str, RoundLogger] = {}
        for name in tracking_of(folder.run).loggers:
            with _told(name):
                self._loggers[name] = LOGGERS.load(name)(folder, run_id)
        self._refresh()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for name, known in self._loggers.items():
            with _told(name):
                known.close()

    def round(self, line: Mapping[str, Any]) -> None:
        """Add a round that has ended."""
        for name, known in self._loggers.items():
            with _told(f"round {line['round']}: {name}"):
                known.add(line)
        if time.monotonic() - self._page_at >= _PAGE_EVERY_S:
            self._refresh()

    def _refresh(self) -> None:
        refresh_page(self._folder.path)
        self._page_at = time.monotonic()


def log_images(folder: RunFolder, run_id: str, images: Mapping[str, bytes]) -> None:
    """Give images of a finished run's model to the loggers of the run, as of its last round.

    Args:
        folder: Of the run.
        run_id: As the loggers were told it.
        images: PNG files by name.
    """
    last = folder.rounds()[-1]["round"]
    for name in tracking_of(folder.run).loggers:
        with _told(f"images: {name}"):
            logger_class = LOGGERS.load(name)
            if not hasattr(logger_class, "add_images"):
                continue
            known = logger_class(folder, run_id)
            known.add_images(last, images)
            known.close()


@contextmanager
def _told(name: str) -> Iterator[None]:
    """Turn an error of a logger into a line in the log."""
    try:
        yield
    except OSError as error:
        logger.warning("%s: cannot be written (%s)", name, error.strerror or one_line(str(error)))
    except Exception as error:
        logger.warning("%s: %s", name, one_line(f"{type(error).__name__}: {error}"))


def refresh_page(run_dir: Path) -> None:
    """Write status.html anew."""
    try:
        write_status(run_dir)
    except (OSError, PanfmError) as error:
        logger.warning("status.html: cannot be written: %s", error)


def scalars(line: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield name and value of all numbers in a round's line; those that are null are left out."""
    values = {
        "loss/federation": line["loss"],
        "round/seconds": line["seconds"],
        "round/sites": len(line["sites"]),
        "round/left-out": len(line["rejected"]) + len(line.get("away", {})),
        "bytes/up": sum(line["bytes_up"].values()),
        "bytes/down": sum(line["bytes_down"].values()),
        **{f"saliency/{stream}": share for stream, share in (line["profile"] or {}).items()},
        **{f"coverage/{stream}": len(sites) for stream, sites in line["coverage"].items()},
        **{f"epsilon/{site}": cost for site, cost in line.get("epsilon", {}).items()},
        **{f"update-norm/{group}": fmean(norms) for group, norms in update_norms(line).items()},
        **({"gate/measure": gate["measure"], "gate/kept": int(gate["kept"])} if (gate := line.get("gate")) else {}),
    }
    for site, reply in line["sites"].items():
        values |= {f"loss/{site}": reply["loss"], f"validation-loss/{site}": reply["validation_loss"]}
        values |= {f"seconds/{site}": reply["seconds"]}
        values |= {f"{name}/{site}": value for name, value in reply.get("monitors", {}).items()}
    yield from ((name, float(value)) for name, value in values.items() if value is not None)


def update_norms(line: Mapping[str, Any]) -> dict[str, list[float]]:
    """Group -> L2 norms of the sites' updates in a round's line."""
    norms: dict[str, list[float]] = {}
    for reply in line["sites"].values():
        for group, norm in reply.get("norms", {}).items():
            norms.setdefault(group, []).append(norm)
    return norms
