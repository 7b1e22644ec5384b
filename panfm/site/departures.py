"""What left the site: one line per message, written before the message goes, each bound to all before it by a hash.

    time, kind, run, round     which message
    arrays                     name, type and length of each group of parameters
    numbers, words             names of what else is in it
    privacy                    what the run that the question names may say of its patients' privacy; none without one
    epsilon                    what this and all private rounds before have spent on these patients; null if not private
    bytes, sha256              of the message as it left
    chain                      SHA-256 of the line before's chain and of this line

No answer goes out that is not on disk here (a refusal of bytes that were no question, before the site is asked
anything, says nothing of it and is not kept). Whoever wrote down the last chain can tell whether lines were changed or
taken out since.
"""

import hashlib
import json
import logging
import os
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from panfm.errors import DataError
from panfm.files import FileStamp
from panfm.privacy.ledger import Departed
from panfm.sharing.frames import Frame, Kind

Line = dict[str, Any]
logger = logging.getLogger(__name__)
_FIRST = "0" * 64


class Departures:
    """The record of one site. One process writes it, any may read it.

    The writer verifies the record when it first adds a message, and again when somebody else has touched the file. In
    between a message costs the same however long the record is.
    """

    def __init__(self, folder: Path) -> None:
        """Args: folder: where the site keeps its state."""
        self.path = folder / "departures.jsonl"
        self._end = _FIRST
        """The chain of the last line that was written to its end."""
        self._size = 0
        """Bytes up to there."""
        self._stamp: FileStamp | None = None
        """Of the file when these two were right."""

    def append(self, frame: Frame, content: bytes, *, privacy: str = "none", epsilon: float | None = None) -> None:
        """Add a message that is about to leave. Raises OSError if that cannot be written: then it must stay."""
        line = _describe(frame, content) | {"privacy": privacy, "epsilon": epsilon}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab") as file:
            if FileStamp.of(file) != self._stamp:
                self._find_end()
            line["chain"] = _chain(self._end, line)
            text = json.dumps(line).encode() + b"\n"
            file.truncate(self._size)
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
            self._end, self._size, self._stamp = line["chain"], self._size + len(text), FileStamp.of(file)

    def private_rounds(self) -> Departed:
        """What private rounds left, as far as this record tells. Raises DataError as `lines` does."""
        departed = Departed()
        for line in self.lines():
            is_private_round = line.get("kind") == Kind.ANSWER and line.get("round") is not None
            is_private_round = is_private_round and line.get("privacy", "none") != "none"
            epsilon = departed.epsilon if line.get("epsilon") is None else line["epsilon"]
            departed = Departed(departed.rounds + is_private_round, epsilon)
        return departed

    def _find_end(self) -> None:
        """Read the whole record; one that was tampered with is told, and goes on from its last line."""
        try:
            for _ in self.lines():
                pass
        except DataError as error:
            logger.warning("the record of what left was tampered with: %s", error)
        whole = self._whole()
        self._end, self._size = _chain_of(whole[-1]) if whole else _FIRST, sum(map(len, whole))

    def lines(self) -> Iterator[Line]:
        """Every message, oldest first.

        Raises:
            DataError: a line was changed, moved, or taken out before the last one; or the file cannot be read.
        """
        before = _FIRST
        try:
            whole = self._whole()
        except OSError as error:
            raise DataError(f"{self.path}: cannot be read ({error.strerror})") from error
        for number, text in enumerate(whole, start=1):
            try:
                line = json.loads(text)
                chain = line.pop("chain")
            except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
                raise DataError(f"{self.path}: line {number} is none, expected what was written") from error
            if chain != _chain(before, line):
                raise DataError(f"{self.path}: line {number} was changed, or one before it was taken out")
            before = chain
            yield line | {"chain": chain}

    def _whole(self) -> list[bytes]:
        """Lines that were written to their end; the rest of a crash is none, and its message never left."""
        lines = self.path.read_bytes().splitlines(keepends=True) if self.path.exists() else []
        return [line for line in lines if line.endswith(b"\n")]


def _describe(frame: Frame, content: bytes) -> Line:
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


def _chain_of(text: bytes) -> str:
    """The chain that a line ends with; a line that somebody spoilt breaks it, and work goes on."""
    try:
        return str(json.loads(text)["chain"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return hashlib.sha256(text).hexdigest()


def _chain(before: str, line: Line) -> str:
    return hashlib.sha256((before + json.dumps(line, sort_keys=True)).encode()).hexdigest()
