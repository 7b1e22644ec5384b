"""Files on disk: atomic writes, checksums, locks, and one file per round. JSON and new folders: panfm/outputs.py."""

import fcntl
import hashlib
import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any, Self

from panfm.errors import DataError, reason

KEPT_ROUNDS = 3
"""Files of `RoundFiles` that are kept."""
_DIGEST_BYTES = 64
_LOCK_POLL_S = 0.1


def make_files_private() -> None:
    """Let this process, and those that it starts, make files and folders for their own account alone (umask 077)."""
    os.umask(0o077)


@contextmanager
def open_atomic(path: Path, *, mode: int = 0o666) -> Iterator[IO[bytes]]:
    """Open a file for writing that takes its name when the block has ended and its content is on the disk.

    A reader, or a crash, meets the old content or the new one, never a part: the content goes to a temporary file
    of the same folder (`*.part`), then fsync, rename, fsync of the folder.

    Args:
        mode: Rights of the file, before the process's umask.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.part")
    try:
        with open(part, "xb", opener=partial(os.open, mode=mode)) as file:
            yield file
            sync(file)
        part.replace(path)
    except OSError as error:
        error.filename = str(path)  # a full disk has none
        raise
    finally:
        part.unlink(missing_ok=True)
    _sync_folder(path.parent)


def write_atomic(path: Path, content: bytes, *, mode: int = 0o666) -> None:
    """Write a whole file; see `open_atomic`."""
    with open_atomic(path, mode=mode) as file:
        file.write(content)


def sync(file: IO[Any]) -> None:
    """Wait until all that was written to an open file is on the disk."""
    file.flush()
    os.fsync(file.fileno())


def lock(file: IO[Any], *, shared: bool = False) -> None:
    """Wait for a lock on an open file, and keep it until the file is closed. Any number may share one."""
    fcntl.flock(file, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)


@contextmanager
def locked(path: Path, *, wait_s: float) -> Iterator[None]:
    """Hold a lock file; it is free again when the block ends, or the process and all it has forked.

    Raises:
        BlockingIOError: another process holds it, for longer than `wait_s`.
    """
    deadline = time.monotonic() + wait_s
    with path.open("ab") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise
                time.sleep(_LOCK_POLL_S)
        yield


def is_locked(path: Path) -> bool:
    """Whether somebody holds the lock file now."""
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


@dataclass(frozen=True)
class FileStamp:
    """Which file this is, and when it last changed.

    Whoever has verified a file need not read it again while its stamp is the same. A change within the clock tick (a
    few ms) of the stamp does not show.
    """

    device: int
    inode: int
    size: int
    changed_ns: int
    """Time of the last change of content or owner; unlike the time of modification it cannot be set."""

    @classmethod
    def of(cls, file: IO[bytes]) -> Self:
        """The stamp of an open file, all of which is on disk."""
        status = os.fstat(file.fileno())
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_ctime_ns)


def write_checked(path: Path, content: bytes, *, mode: int = 0o666) -> str:
    """Write `content` atomically behind its SHA-256; returns the hex digest."""
    digest = hashlib.sha256(content).hexdigest()
    with open_atomic(path, mode=mode) as file:
        file.writelines([digest.encode(), content])
    return digest


def read_checked(path: Path) -> bytes:
    """Read what `write_checked` wrote.

    Raises:
        DataError: the file cannot be read, or its content is not what was written.
    """
    try:
        with path.open("rb") as file:
            digest, content = file.read(_DIGEST_BYTES), file.read()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({reason(error)})") from error
    if hashlib.sha256(content).hexdigest().encode() != digest:
        raise DataError(f"{path}: corrupted, its checksum does not match; delete it to fall back to the one before")
    return content


def read_checked_start(path: Path, size: int) -> bytes:
    """The first bytes of what `write_checked` wrote, unchecked. Raises DataError if the file cannot be read."""
    try:
        with path.open("rb") as file:
            file.seek(_DIGEST_BYTES)
            return file.read(size)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({reason(error)})") from error


def read_digest(path: Path) -> str:
    """The digest that stands at the head of a checked file; empty if there is no such file."""
    try:
        with path.open("rb") as file:
            return file.read(_DIGEST_BYTES).decode("ascii", "replace")
    except OSError:
        return ""


class RoundFiles:
    """Checked files of a folder, one per round, of which the last three are kept: `round-000007.state`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, round_number: int) -> Path:
        """Path of a round's file, whether it is there or not."""
        return self.folder / f"round-{round_number:06d}.state"

    def rounds(self) -> list[int]:
        """Rounds that have a file, in order."""
        return sorted(int(path.stem.removeprefix("round-")) for path in self.folder.glob("round-*.state"))

    def write(self, round_number: int, content: bytes) -> str:
        """Write a round's file; returns its digest.

        Older files than the last three are removed, and those of later rounds: a server that went back has made them
        another past.
        """
        digest = write_checked(self.path(round_number), content)
        rounds = self.rounds()
        kept = [number for number in rounds if number <= round_number][-KEPT_ROUNDS:]
        for number in set(rounds) - set(kept):
            self.path(number).unlink()
        return digest


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
