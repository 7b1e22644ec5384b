"""What the server must remember to go on after a crash: one file per round, whole or absent, checksummed.

<folder>/round-000007.state     global groups, saliency profile, the strategy's memory and run id after round 7
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.numpy

from panfm.errors import DataError
from panfm.files import read_checked, write_checked
from panfm.sharing.groups import Flat
from strategies import Memory

KEPT = 3
"""Rounds kept."""
_GLOBAL = "global"


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
    memory: Memory = field(default_factory=Memory)
    """What the strategy carries: usual norms, server optimisers."""


def save_state(folder: Path, state: ServerState) -> None:
    """Write the state after a round; older ones than the last three go."""
    words = {
        "run-id": state.run_id,
        "round": state.round_number,
        "profile": state.profile and dict(state.profile),
        "norms": dict(state.memory.norms),
    }
    tensors = {f"{_GLOBAL}/{group}": flat for group, flat in state.groups.items()}
    tensors |= {f"{slot}/{group}": flat for group, slots in state.memory.slots.items() for slot, flat in slots.items()}
    content = json.dumps(words).encode() + b"\n" + safetensors.numpy.save(tensors)
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
        return _restored(json.loads(text), safetensors.numpy.load(tensors))
    except (KeyError, ValueError, safetensors.SafetensorError) as error:
        raise DataError(f"{files[-1]}: not a checkpoint of this version") from error


def _restored(words: dict[str, Any], tensors: dict[str, Flat]) -> ServerState:
    found: dict[str, dict[str, Flat]] = {}
    for name, flat in tensors.items():
        slot, _, group = name.partition("/")
        found.setdefault(group, {})[slot] = flat
    groups = {group: slots.pop(_GLOBAL) for group, slots in found.items()}
    norms = {group: tuple(medians) for group, medians in words["norms"].items()}
    memory = Memory(norms, {group: slots for group, slots in found.items() if slots})
    return ServerState(words["run-id"], words["round"], groups, words["profile"], memory)


def _path(folder: Path, round_number: int) -> Path:
    return folder / f"round-{round_number:06d}.state"
