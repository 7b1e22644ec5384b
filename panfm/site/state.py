"""A site's private training state on its own disk: one file per round, whole or absent, checksummed.

    <folder>/runs/<run id>/round-000007.state     what the site keeps to itself after round 7

A round starts from the newest file of an earlier round, so a repeated round starts where it started the first time.

Every file says which experiment made it, what that experiment may say of its patients' privacy, and which patients it
was trained on. The server chooses run ids: under an id whose files were made otherwise no round runs, or what a run
without privacy has learned would come out in one that claims it.
"""

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path

import safetensors.numpy
import torch
from torch import Tensor

from panfm.errors import DataError, ProtocolError
from panfm.files import read_checked, read_checked_start, read_digest, write_checked

KEPT = 3
RUNS = "runs"
"""A folder of their own: a run id comes over the wire, and may be named like a file of the site's."""
_RUN_ID = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_ORIGIN = "origin"
_SIZE_BYTES = 8
"""A safetensors file starts with the length of its header."""


@dataclass(frozen=True)
class Origin:
    """What a private state comes from."""

    experiment: str
    """Hash of the run's description, with the site's own public number of patients."""
    privacy: str
    """What the run may say of its patients' privacy."""
    patients: str
    """Fingerprint of the patients that it is trained on, and their images."""


class StateStore:
    """Private states of one run at one site."""

    def __init__(self, folder: Path, run_id: str, origin: Origin | None = None) -> None:
        """States that may be read; with their origin also written, and trained from.

        Raises:
            ProtocolError: the run id, which came over the wire, is not a plain name.
        """
        if not _RUN_ID.fullmatch(run_id):
            raise ProtocolError("run id: expected lower-case letters, digits, dot, dash, underscore")
        self.folder = folder / RUNS / run_id
        self._origin = origin

    def check_origin(self) -> None:
        """Raises DataError if a state under this run id has another origin, or none."""
        assert self._origin is not None
        for number in sorted(self._rounds()):
            self._check_origin(self._path(number), self._origin)

    def round_before(self, round_number: int) -> int:
        """The newest round before this one whose state is on disk; 0 if there is none."""
        return max((number for number in self._rounds() if number < round_number), default=0)

    def load(self, round_number: int) -> dict[str, Tensor]:
        """State after a round. Raises DataError, naming the file, if it is corrupted."""
        arrays = safetensors.numpy.load(read_checked(self._path(round_number)))
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    def save(self, round_number: int, state: dict[str, Tensor]) -> str:
        """Write the state after a round; returns its digest.

        The last three rounds are kept. Later ones go: a server that went back has made them another past.
        """
        assert self._origin is not None
        metadata = {_ORIGIN: json.dumps(asdict(self._origin))}
        content = safetensors.numpy.save({name: tensor.numpy() for name, tensor in state.items()}, metadata)
        digest = write_checked(self._path(round_number), content)
        past = sorted(number for number in self._rounds() if number <= round_number)
        for number in set(self._rounds()) - set(past[-KEPT:]):
            self._path(number).unlink()
        return digest

    def digest(self, round_number: int) -> str:
        """Digest of the state after a round, as written at the head of its file; empty if absent."""
        return read_digest(self._path(round_number))

    def _check_origin(self, path: Path, expected: Origin) -> None:
        remedy = f"move {self.folder} away to start run {self.folder.name} afresh"
        found = _read_origin(path)
        if found is None:
            read_checked(path)
            raise DataError(f"{path}: does not say which experiment it comes from; {remedy}")
        for name, value in asdict(expected).items():
            if found.get(name) != value:
                raise DataError(f"{path}: comes from {name} {found.get(name)!s:.24}, expected {value:.24}; {remedy}")

    def _path(self, round_number: int) -> Path:
        return self.folder / f"round-{round_number:06d}.state"

    def _rounds(self) -> list[int]:
        return [int(path.stem.removeprefix("round-")) for path in self.folder.glob("round-*.state")]


def _read_origin(path: Path) -> dict[str, str] | None:
    """What a state says of its origin; None if it says nothing."""
    size = int.from_bytes(read_checked_start(path, _SIZE_BYTES), "little")
    header = read_checked_start(path, _SIZE_BYTES + min(size, path.stat().st_size))[_SIZE_BYTES:]
    try:
        return dict(json.loads(json.loads(header)["__metadata__"][_ORIGIN]))
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
