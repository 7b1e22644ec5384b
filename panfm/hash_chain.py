"""Files of JSON lines in which every line holds a hash that binds it to all lines before it.

A line that was changed, moved or taken out breaks the chain. Lines cut off at the end do not: the anchor, a file kept
elsewhere, remembers the hash of the newest line; and a hash that somebody noted tells whether its line is still there.

A process verifies the whole file when it first reads it, and again when another process has touched it. In between, a
line costs the same however long the file is.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedRandom
from pathlib import Path
from typing import IO, Any

from panfm.errors import DataError, PanfmError
from panfm.files import FileStamp, lock, sync, write_atomic

FIRST_HASH = "0" * 64
"""Stands for the hash of the line before the first."""
Entry = Mapping[str, Any]
Seal = Callable[[Mapping[str, Any], str], bytes]
"""Makes the bytes of a line, with its end, from its content and the hash of the line before."""


def sealed(content: Mapping[str, Any], before: str) -> bytes:
    """Make a line that holds, under `chain`, the SHA-256 of the line before's hash and of its own content."""
    chain = hashlib.sha256((before + json.dumps(content, sort_keys=True)).encode()).hexdigest()
    return json.dumps({**content, "chain": chain}).encode() + b"\n"


@dataclass(frozen=True)
class Position:
    """Where a chain ended when this process last verified it or added to it."""

    size: int = 0
    """Bytes of all whole lines."""
    end: str = FIRST_HASH
    """Hash of the newest line."""
    stamp: FileStamp | None = None
    """Of the file at that time."""

    def is_current(self, file: IO[bytes]) -> bool:
        """Whether no other process has touched the file since."""
        return FileStamp.of(file) == self.stamp


class HashChain:
    """One chained file, and its anchor if it has one.

    Guarantees:
        durable: `append` returns after the line, then the anchor, is on disk.
        torn: a last line without its end, which a crash leaves, is no entry, and the next line takes its place.
    """

    def __init__(
        self, path: Path, seal: Seal, *, key: str, anchor: Path | None = None, error: type[PanfmError] = DataError
    ) -> None:
        """Name a chain; nothing is read or written yet.

        Args:
            key: Under which a line holds its hash.
            anchor: File that remembers the hash of the newest line.
            error: Raised where the file does not hold.
        """
        self.path = path
        self.anchor = anchor
        self._seal = seal
        self._key = key
        self._error = error

    @contextmanager
    def writing(self) -> Iterator[BufferedRandom]:
        """Open the file for reading and appending, and lock all others out. It is made if it is not there."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            file = self.path.open("a+b")
        except OSError as error:
            raise self._error(f"{self.path}: cannot be opened ({error.strerror}), expected a writable file") from error
        with file:
            lock(file)
            yield file

    @contextmanager
    def reading(self) -> Iterator[IO[bytes]]:
        """Open the file for reading, and lock writers out; an empty file if there is none."""
        try:
            file = self.path.open("rb")
        except FileNotFoundError:
            file = Path(os.devnull).open("rb")  # noqa: SIM115
        except OSError as error:
            raise self._error(_unreadable(self.path, error)) from error
        with file:
            lock(file, shared=True)
            yield file

    def verified(self, content: bytes) -> Iterator[Entry]:
        """Yield the entries of the file's content, oldest first. Raises the chain's error at the first faulty line."""
        before = FIRST_HASH
        for number, line in enumerate(content.split(b"\n")[:-1], start=1):
            try:
                entry = json.loads(line)
                sealed = self._seal({key: value for key, value in entry.items() if key != self._key}, before)
                before = entry[self._key]
            except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
                raise self._error(f"{self.path}: line {number} is no entry, expected what was written") from error
            if sealed != line + b"\n":
                raise self._error(f"{self.path}: line {number} was changed, moved, or follows a line that was removed")
            yield entry

    def snapshot(self, file: IO[bytes]) -> tuple[bytes, Position]:
        """Read an open file; returns its content and the position after the last whole line, whatever the lines hold.

        Guarantees:
            noticed: a change after the read makes the position stale, since the file was stamped before it.
        """
        stamp = FileStamp.of(file)
        file.seek(0)
        content = file.read()
        whole, newline, _ = content.rpartition(b"\n")
        last = whole.rpartition(b"\n")[2]
        end = self._hash_of(last) if newline else FIRST_HASH
        return content, Position(len(whole) + len(newline), end, stamp)

    def append(self, file: BufferedRandom, position: Position, content: Mapping[str, Any]) -> tuple[Entry, Position]:
        """Add a line after a position, instead of what follows it; returns the entry, and the new position."""
        line = self._seal(content, position.end)
        entry = json.loads(line)
        file.truncate(position.size)
        file.write(line)
        sync(file)
        end = entry[self._key]
        if self.anchor:
            self.write_anchor(end)
        return entry, Position(position.size + len(line), end, FileStamp.of(file))

    def read_anchor(self) -> str | None:
        """The hash that the anchor remembers; None without an anchor."""
        try:
            return self.anchor.read_bytes().decode("ascii", "replace") if self.anchor else None
        except FileNotFoundError:
            return None
        except OSError as error:
            raise self._error(_unreadable(self.anchor, error)) from error

    def write_anchor(self, end: str) -> None:
        """Remember the hash of the newest line."""
        assert self.anchor is not None
        write_atomic(self.anchor, end.encode())

    def check_anchor(self, entries: Sequence[Entry], remedy: str) -> None:
        """Raise the chain's error if the anchor is missing, or remembers a hash that none of the entries has.

        A crash between the first line and its anchor leaves one entry without an anchor, which is accepted.

        Args:
            remedy: What an operator may do, instead of restoring the anchor, where it is lost for good.
        """
        if self.anchor is None:
            return
        newest = self.read_anchor()
        if newest is None and len(entries) > 1:
            raise self._error(
                f"{self.path}: its anchor {self.anchor} is missing, so that nobody can tell whether its end was cut "
                f"off; restore the anchor, or {remedy}"
            )
        if newest is not None and newest not in {entry[self._key] for entry in entries}:
            raise self._error(
                f"{self.path}: missing, foreign or cut off: the newest entry that this site remembers is not in it; "
                "restore the file from a backup"
            )

    def check_noted(self, entries: Iterable[Entry], noted: str) -> None:
        """Raise the chain's error if none of the entries has the hash that somebody noted."""
        if all(entry[self._key] != noted for entry in entries):
            raise self._error(f"{self.path}: the end noted is not in it, lines were cut off or written anew")

    def _hash_of(self, line: bytes) -> str:
        """The hash that a line holds; that of its bytes if it holds none, so that a spoilt line breaks the chain."""
        try:
            return str(json.loads(line)[self._key])
        except (ValueError, KeyError, TypeError, RecursionError):
            return hashlib.sha256(line + b"\n").hexdigest()


def _unreadable(path: Path | None, error: OSError) -> str:
    return f"{path}: found a file that cannot be read ({error.strerror}), expected records"
