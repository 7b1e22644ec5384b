"""Checkpoints, from which the server resumes after a crash: one file per round, whole or absent, checksummed.

<folder>/round-000007.state     global groups, saliency profile, the strategy's memory and run id after round 7
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.numpy

from panfm.errors import DataError
from panfm.files import RoundFiles, read_checked
from panfm.sharing.groups import Flat
from strategies import Memory

_GLOBAL = "global"
_ARRAYS = ("step", "lost", "average", "votes")
"""Arrays of the memory by group; with the global groups parts of a checkpoint, whose other parts are slots of server
optimisers."""


@dataclass(frozen=True)
class Measure:
    """Measure of a model by which a gate keeps rounds (round_gate.py)."""

    value: float
    """Lower is better."""
    round_number: int
    """The round that made the model; 0: the start."""
    patients: Mapping[str, Mapping[str, int]]
    """Site -> task of labels, or `val` -> number of its patients that are behind it."""


@dataclass(frozen=True)
class ServerState:
    """State of a run between rounds. Resuming from it gives the bits of an undisturbed run."""

    run_id: str
    round_number: int
    """Rounds done; 0: the initial model."""
    groups: Mapping[str, Flat]
    """Group -> global parameters, packed."""
    profile: Mapping[str, float] | None = None
    """Federation's saliency per stream, relative to an equal split."""
    memory: Memory = field(default_factory=Memory)
    """Memory of the strategy: usual norms and directions, server optimisers."""
    measure: Measure | None = None
    """Of this model, in a run with a gate."""


def save_state(folder: Path, state: ServerState) -> None:
    """Write the state after a round; older ones than the last three go."""
    words = {
        "run-id": state.run_id,
        "round": state.round_number,
        "profile": state.profile and dict(state.profile),
        "norms": state.memory.norms,
        "cosines": state.memory.cosines,
        "voters": state.memory.voters,
        "holders": state.memory.holders,
    }
    memory = state.memory
    if memory.frozen_holders:
        words["frozen-holders"] = memory.frozen_holders
    if state.measure:
        words["measure"] = asdict(state.measure)
    parts = {_GLOBAL: state.groups, **{name: getattr(memory, name) for name in _ARRAYS}}
    tensors = {f"{part}/{name}": array for part, arrays in parts.items() for name, array in arrays.items()}
    tensors |= {f"{slot}/{group}": flat for group, slots in memory.slots.items() for slot, flat in slots.items()}
    content = json.dumps(words).encode() + b"\n" + safetensors.numpy.save(tensors)
    RoundFiles(folder).write(state.round_number, content)


def load_latest(folder: Path) -> ServerState | None:
    """The state after the last round that was saved; None if there is none. Raises DataError as `load_round`."""
    rounds = RoundFiles(folder).rounds()
    return load_round(folder, rounds[-1]) if rounds else None


def load_round(folder: Path, round_number: int) -> ServerState:
    """The state after one of the rounds that `RoundFiles` keeps.

    Raises:
        DataError: its file is corrupted; the line names it.
    """
    path = RoundFiles(folder).path(round_number)
    text, _, tensors = read_checked(path).partition(b"\n")
    try:
        return _restored(json.loads(text), safetensors.numpy.load(tensors))
    except (KeyError, ValueError, safetensors.SafetensorError) as error:
        raise DataError(f"{path}: not a checkpoint of this version") from error


def _restored(words: dict[str, Any], tensors: dict[str, Flat]) -> ServerState:
    parts: dict[str, dict[str, Flat]] = {}
    for name, flat in tensors.items():
        part, _, rest = name.partition("/")
        parts.setdefault(part, {})[rest] = flat
    groups = parts.pop(_GLOBAL, {})
    arrays_by_name: dict[str, Any] = {name: parts.pop(name, {}) for name in _ARRAYS}
    slots: dict[str, dict[str, Flat]] = {}
    for slot, arrays in parts.items():
        for group, flat in arrays.items():
            slots.setdefault(group, {})[slot] = flat
    norms = {
        group: {site: tuple((number, norm) for number, norm in entries) for site, entries in sites.items()}
        for group, sites in words["norms"].items()
    }
    memory = Memory(
        norms,
        dict(slots),
        holders=tuple(words["holders"]),
        frozen_holders=tuple(words.get("frozen-holders", ())),
        cosines=words["cosines"],
        voters={group: tuple(sites) for group, sites in words["voters"].items()},
        **arrays_by_name,
    )
    measure = Measure(**words["measure"]) if "measure" in words else None
    return ServerState(words["run-id"], words["round"], groups, words["profile"], memory, measure)
