"""A site's private training state on its own disk: one file per round, whole or absent, checksummed.

    <folder>/runs/<run id>/round-000007.state     what the site keeps to itself after round 7

A round starts from the newest file of an earlier round, so a repeated round starts where it started the first time.
"""

import re
from pathlib import Path

import safetensors.numpy
import torch
from torch import Tensor

from panfm.errors import ProtocolError
from panfm.files import read_checked, read_digest, write_checked

KEPT = 3
RUNS = "runs"
"""A folder of their own: a run id comes over the wire, and may be named like a file of the site's."""
_RUN_ID = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")


class StateStore:
    """Private states of one run at one site."""

    def __init__(self, folder: Path, run_id: str) -> None:
        """Raises ProtocolError if the run id, which came over the wire, is not a plain name."""
        if not _RUN_ID.fullmatch(run_id):
            raise ProtocolError("run id: expected lower-case letters, digits, dot, dash, underscore")
        self.folder = folder / RUNS / run_id

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
        content = safetensors.numpy.save({name: tensor.numpy() for name, tensor in state.items()})
        digest = write_checked(self._path(round_number), content)
        past = sorted(number for number in self._rounds() if number <= round_number)
        for number in set(self._rounds()) - set(past[-KEPT:]):
            self._path(number).unlink()
        return digest

    def digest(self, round_number: int) -> str:
        """Digest of the state after a round, as written at the head of its file; empty if absent."""
        return read_digest(self._path(round_number))

    def _path(self, round_number: int) -> Path:
        return self.folder / f"round-{round_number:06d}.state"

    def _rounds(self) -> list[int]:
        return [int(path.stem.removeprefix("round-")) for path in self.folder.glob("round-*.state")]
