"""The audit log of a site: one line per message that left it, written before the message goes (hash_chain.py).

    time, kind, run, round     which message
    experiment                 hash of the run's description; null without one
    arrays                     name, type and length of each group of parameters
    numbers, words             names of its other entries
    privacy                    what the run that the question names may say of its patients' privacy; none without one
    epsilon                    what this and all private rounds before have spent on these patients; null if not private
    summed                     of sums over patients: their purpose, and each task's columns of labels, or the streams
    repeat                     true: a private reply that was kept, and is paid for; none in all other lines
    bytes, sha256              of the message as it left
    anchored                   true: there was an anchor; none in logs of older versions, which get one at the next line
    chain                      SHA-256 of the line before's chain and of this line

Every answer is on disk here before it goes out, and the hash of its line in the anchor, `departures.anchor`. So a log
that was cut off or removed is noticed, unless the anchor was forged or removed too; nothing leaves then until the
operator has restored it, or accepted what is there. Who may write into the state folder can do both: an end that was
noted elsewhere finds it. (A refusal of bytes that are not a question tells nothing about the site and is not kept.)
"""

import hashlib
import logging
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from panfm.errors import DataError
from panfm.hash_chain import FIRST_HASH, Entry, HashChain, Position, sealed
from panfm.sharing.frames import Frame, Kind

if TYPE_CHECKING:
    from panfm.privacy.ledger import AnsweredRounds

FILE = "departures.jsonl"
ANCHOR = "departures.anchor"
logger = logging.getLogger(__name__)


class AuditLog:
    """The audit log of one site. One process writes it, any may read it."""

    def __init__(self, state_dir: Path) -> None:
        """Args: state_dir: where the site keeps its state."""
        self.path = state_dir / FILE
        self.chain = HashChain(self.path, sealed, key="chain", anchor=state_dir / ANCHOR)
        self._position = Position()

    def append(
        self,
        frame: Frame,
        content: bytes,
        *,
        experiment: str | None = None,
        privacy: str = "none",
        epsilon: float | None = None,
        summed: Mapping[str, Any] | None = None,
        is_repeat: bool = False,
    ) -> None:
        """Add a message that is about to leave.

        A line that was changed is told of, and the log goes on from its last line.

        Raises:
            DataError: lines were cut off, or the log or its anchor was removed.
            OSError: the line cannot be written. After both the message must stay.
        """
        with self.chain.writing() as file:
            if not self._position.is_current(file):
                before, self._position = self.chain.snapshot(file)
                self._warn_of_tampering(before)
            if not self._position.size or self.chain.read_anchor() != self._position.end:
                self._check_anchor(self.chain.snapshot(file)[0])
                if self._position.size:
                    logger.warning("%s: gets an anchor for %d bytes", self.path, self._position.size)
                self.chain.write_anchor(self._position.end)
            line = _describe(frame, content) | {"experiment": experiment, "privacy": privacy, "epsilon": epsilon}
            more = {"summed": summed, "repeat": is_repeat}
            line |= {"anchored": True} | {name: value for name, value in more.items() if value}
            _, self._position = self.chain.append(file, self._position, line)

    def lines(self) -> Iterator[Entry]:
        """Yield every message, oldest first.

        Raises:
            DataError: a line was changed, moved, or taken out; or the file cannot be read.
        """
        with self.chain.reading() as file:
            content = file.read()
            self._check_anchor(content)
        yield from self.chain.verified(content)

    def rounds_of(self, experiment: str) -> set[tuple[str, int]]:
        """Run id and number of the rounds of an experiment that were answered. Raises DataError as `lines` does."""
        return {
            (line["run"], line["round"])
            for line in self.lines()
            if line.get("experiment") == experiment
            and line.get("kind") == Kind.ANSWER
            and line.get("round") is not None
            and "summed" not in line
        }

    def private_rounds(self) -> "AnsweredRounds":
        """Count the answered private rounds. Raises DataError as `lines` does."""
        from panfm.privacy.ledger import AnsweredRounds  # imported here: only private runs need it

        count, epsilon = 0, None
        for line in self.lines():
            is_round = line.get("kind") == Kind.ANSWER and line.get("round") is not None
            count += is_round and line.get("privacy", "none") != "none" and "repeat" not in line
            epsilon = epsilon if line.get("epsilon") is None else line["epsilon"]
        return AnsweredRounds(count, epsilon)

    def _check_anchor(self, content: bytes) -> None:
        """Raise DataError unless the anchor remembers one of the two newest lines (a full disk may keep it from the
        last), or is missing from a log that never had one."""
        newest, anchor = content.split(b"\n")[:-1][-2:], self.chain.read_anchor()
        mark = b'"anchored": true' if anchor is None else f'"chain": "{anchor}"'.encode()
        if (anchor != FIRST_HASH or len(newest) > 1) and any(mark in line for line in newest) == (anchor is None):
            raise DataError(
                f"{self.path}: cut off or removed, or its anchor is; restore it, or: site log SITE --accept"
            )

    def _warn_of_tampering(self, content: bytes) -> None:
        try:
            list(self.chain.verified(content))
        except DataError as error:
            logger.warning("the audit log was tampered with: %s", error)


def _describe(frame: Frame, content: bytes) -> dict[str, Any]:
    """The line of a message, without privacy and chain."""
    records = frame.records
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "kind": frame.kind.value,
        "run": records.config.get("run-id"),
        "round": records.config.get("round"),
        "arrays": [[name, array.dtype.name, array.size] for name, array in records.arrays.items()],
        "numbers": sorted(records.metrics),
        "words": sorted(records.config),
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
    }
