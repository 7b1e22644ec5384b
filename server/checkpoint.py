"""What the server must remember to go on after a crash: one file per round, whole or absent, checksummed.

<folder>/round-000007.state     global groups, saliency profile and run id after round 7
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import safetensors
import safetensors.numpy

from panfm.errors import DataError
from panfm.files import read_checked, write_checked
from panfm.sharing.groups import Flat

KEPT = 3
"""Rounds kept."""


@dataclass(frozen=True)
class ServerState:
    """Where a run stands. Resuming from it gives the bits of an undisturbed run."""

    run_id: str
    round_number: int
    """Rounds done; 0: the initial model."""
    groups: Mapping[str, Flat]
    """Group -> global parameters, packed."""
    profile: Mapping[str, float] | None = None
    """Federation's saliency per stream, relative to an equal split."""


def save_state(folder: Path, state: ServerState) -> None:
    """Write the state after a round; older ones than the last three go."""
    words = {"run-id": state.run_id, "round": state.round_number, "profile": state.profile and dict(state.profile)}
    content = json.dumps(words).encode() + b"\n" + safetensors.numpy.save(dict(state.groups))
    write_checked(_path(folder, state.round_number), content)
    for old in sorted(folder.glob("round-*.state"))[:-KEPT]:
        old.unlink()


def load_latest(folder: Path) -> ServerState | None:
    """The state after the last round that was saved; None if there is none.

    Raises:
        DataError: its file is corrupted; the line names it.
    """
    files = sorted(folder.glob("round-*.state"))
    if not files:
        return None
    text, _, tensors = read_checked(files[-1]).partition(b"\n")
    try:
        words = json.loads(text)
        return ServerState(words["run-id"], words["round"], safetensors.numpy.load(tensors), words["profile"])
    except (KeyError, ValueError, safetensors.SafetensorError) as error:
        raise DataError(f"{files[-1]}: not a checkpoint of this version") from error


def _path(folder: Path, round_number: int) -> Path:
    return folder / f"round-{round_number:06d}.state"
