"""Which questions of a run a site answers: one per round, from the start that the description names, one run at a time.

    <state folder>/runs/<run id>/asked.json    what was asked, round by round; on disk before a round is trained
    <state folder>/runs/<run id>/ended         the operator has ended the run

A round may be asked again with the same bytes, as a resumed server does, and is then trained from the same private
state: the answer tells nothing new. Anything else for a round that was asked, and a round before the newest that was
not asked then, is refused: five answers about one patient's gradient cost five rounds of the run.

Parameters that are not finite are refused as well: training from them gives nothing of use, and under privacy a
patient's gradient would be there or not, depending on which parts of the model the patient's images go through.
"""

import hashlib
import json
import logging
import math
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from panfm.config import RunConfig, dump_toml, parse_run
from panfm.config.site import LimitsConfig
from panfm.errors import DataError, LimitError, ProtocolError
from panfm.files import read_checked, write_atomic, write_checked
from panfm.models import build_model
from panfm.sharing.groups import Flat, GroupManifest, parameter_hashes
from panfm.sharing.messages import RoundTask
from panfm.site.limits import kept_bytes
from panfm.site.state import RUNS, StateStore

_ASKED = "asked.json"
_ENDED = "ended"
logger = logging.getLogger(__name__)
_SEEDED = f"the run's seed gives with torch {torch.__version__}; another torch at the server may draw others"


@dataclass(frozen=True)
class Asked:
    """What a run has asked of this site so far."""

    rounds: int
    """Of the whole run."""
    newest: float
    """Time of the newest question, in seconds since 1970."""
    digests: Mapping[int, str] = field(default_factory=dict)
    """Round -> digest of its question."""

    @property
    def is_finished(self) -> bool:
        """Whether the last round was asked."""
        return self.rounds in self.digests


def question_digest(run: RunConfig, task: RoundTask, groups: Mapping[str, Flat], state: str) -> str:
    """SHA-256 of everything that decides a round's answer.

    Args:
        groups: The global parameters, whether they came whole or as a step.
        state: Digest of the private state that the round starts from.
    """
    content = [
        dump_toml(run),
        sorted(parameter_hashes(groups).items()),
        sorted(parameter_hashes(task.teacher).items()),
        sorted((task.profile or {}).items()),
        state,
    ]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def admit(states: StateStore, run: RunConfig, round_number: int, digest: str) -> None:
    """Note a question on disk, before it is worked on.

    Raises:
        ProtocolError: the round was asked otherwise before, or a later round was.
        DataError: the note is corrupted.
    """
    known = _read(states.folder)
    digests = dict(known.digests) if known else {}
    if digests.setdefault(round_number, digest) != digest:
        raise ProtocolError(
            f"round {round_number}: asked before with other parameters or from another private state; "
            "to go on from there, start a new run from that model"
        )
    newest = max(digests)
    if known and round_number < newest and round_number not in known.digests:
        raise ProtocolError(
            f"round {round_number}: asked after round {newest}; to go on from an earlier model, start a new run from it"
        )
    note = {"rounds": run.train.rounds, "newest": time.time(), "digests": digests}
    write_checked(states.folder / _ASKED, json.dumps(note).encode())


def check_other_runs(state_dir: Path, run_id: str, limits: LimitsConfig) -> None:
    """Raises LimitError if this run was ended here, or other runs that go on are as many as the site allows."""
    if _is_ended(state_dir / RUNS / run_id):
        raise LimitError.of_question(f"run {run_id}: the operator of this site has ended it")
    active = {name: asked for name, asked in active_runs(state_dir, limits).items() if name != run_id}
    if len(active) >= limits.runs_at_once:
        name, asked = max(active.items(), key=lambda entry: entry[1].newest)
        since = time.strftime("%Y-%m-%d %H:%M", time.localtime(asked.newest))
        rule = f"limits.runs-at-once is {limits.runs_at_once}; this site's operator can end it: panfm site end"
        raise LimitError(
            f"run {name} is not finished, last asked {since}, {rule}", public=f"another run is not finished, {rule}"
        )


def active_runs(state_dir: Path, limits: LimitsConfig) -> dict[str, Asked]:
    """Runs that have asked for rounds and may go on asking, by id."""
    folders = [path.parent for path in sorted(state_dir.glob(f"{RUNS}/*/{_ASKED}"))]
    notes = {folder.name: asked for folder in folders if not _is_ended(folder) and (asked := _read(folder))}
    oldest = time.time() - 3600.0 * limits.idle_hours
    return {name: asked for name, asked in notes.items() if not asked.is_finished and asked.newest >= oldest}


def end_run(state_dir: Path, run_id: str) -> None:
    """Refuse a run's questions from now on. Raises DataError if the site knows no such run."""
    folder = StateStore(state_dir, run_id).folder
    if not (folder / _ASKED).exists():
        raise DataError(f"{folder.parent}: run {run_id} has asked for no round here, see: panfm site status")
    write_atomic(folder / _ENDED, b"")


def make_room(run_folder: Path, run: RunConfig, limits: LimitsConfig) -> None:
    """Remove the private states of the runs longest idle, until those of a run have room beside the others.

    A new run's are one of `limits.kept-runs`, and all of them stay within `limits.state-gib`.

    Raises:
        LimitError: one of the others has been at work within `limits.idle-hours`, and may still go on.
    """
    if not run_folder.parent.exists():
        return
    others = sorted(
        (path for path in run_folder.parent.iterdir() if path.is_dir() and path != run_folder), key=_last_change
    )
    most = math.inf if run_folder.exists() else limits.kept_runs - 1
    room = limits.state_gib * 2**30 - kept_bytes(run)
    while others and (len(others) > most or sum(map(_folder_bytes, others)) > room):
        if time.time() - _last_change(others[0]) < 3600.0 * limits.idle_hours:
            full = (
                f"limits.kept-runs is {limits.kept_runs}, and as many"
                if len(others) > most
                else f"limits.state-gib is {limits.state_gib:g}, and runs that fill it"
            )
            raise LimitError.of_question(f"{full} were at work within limits.idle-hours ({limits.idle_hours:g})")
        logger.warning("private state of run %s, the longest idle, is removed for another run", others[0].name)
        shutil.rmtree(others.pop(0))


def check_finite(
    round_number: int, groups: Mapping[str, Flat], teacher: Mapping[str, Flat], profile: Mapping[str, float] | None
) -> None:
    """Raise ProtocolError if what the server sent for a round is not finite.

    Args:
        groups: Global parameters, coded steps taken.
        teacher: The server's average of them; empty if it sends none.
        profile: Saliency by stream.
    """
    for kind, arrays in (("global parameters", groups), ("teacher", teacher)):
        for group, array in arrays.items():
            if not bool(np.isfinite(array).all()):
                raise ProtocolError(f"round {round_number}: {kind} of group {group} hold NaN or infinity")
    for stream, value in (profile or {}).items():
        if not math.isfinite(value):
            raise ProtocolError(
                f"round {round_number}: saliency of stream {stream} is {value}, expected a finite number"
            )


def check_start(run: RunConfig, streams: Sequence[str], groups: Mapping[str, Flat]) -> None:
    """Check the global parameters of round 1 against the run's description.

    Args:
        streams: Those that this site trains.
    Raises:
        ProtocolError: they are not what `start.parameters` names or, without a start, the seed gives.
    """
    if run.start is not None and run.start.parameters is None:
        raise ProtocolError("start.parameters: missing, expected the hashes that the server's run.toml has")
    if run.start is not None and run.start.parameters is not None:
        expected, source = run.start.parameters, "start.parameters names"
    else:
        expected, source = _seeded_hashes(dump_toml(run), tuple(streams)), _SEEDED
    for group, found in sorted(parameter_hashes(groups).items()):
        if found != expected.get(group):
            raise ProtocolError(f"round 1: {group} is not what {source}")


@lru_cache(maxsize=32)
def _seeded_hashes(run_toml: str, streams: tuple[str, ...]) -> dict[str, str]:
    """Hashes of the shared parameters that a run's seed gives."""
    run = parse_run(run_toml)
    model = build_model(run, streams)
    shared, _ = model.split_state(run.sharing)
    tensors = {name: value.numpy() for name, value in shared.items()}
    manifest = GroupManifest.of(model.parameter_groups(), tensors)
    return parameter_hashes(manifest.pack_all(tensors))


def _is_ended(folder: Path) -> bool:
    return (folder / _ENDED).exists()


def _read(folder: Path) -> Asked | None:
    if not (folder / _ASKED).exists():
        return None
    note = json.loads(read_checked(folder / _ASKED))
    return Asked(note["rounds"], note["newest"], {int(number): digest for number, digest in note["digests"].items()})


def _last_change(folder: Path) -> float:
    """Time of the last change of a run's folder or a file in it, in seconds since 1970."""
    return max(path.stat().st_mtime for path in (folder, *folder.glob("*")))


def _folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*"))
