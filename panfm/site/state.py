"""Stores a site's files of a run: private training states and the questions asked; lists, ends and removes runs.

    <folder>/runs/<run id>/round-000007.state     private state after round 7, checksummed
    <folder>/runs/<run id>/frozen.safetensors     shared parameters that the run does not train, checksummed
    <folder>/runs/<run id>/asked.json             digests of the questions, by round; on disk before one is worked on
    <folder>/runs/<run id>/reply.kept             the last private reply (kept_reply.py)
    <folder>/runs/<run id>/ended                  the operator has ended the run

A round starts from the newest state of an earlier round, so a repeated round starts where it started the first time. It
may be asked again with the same bytes, as a resumed server does, and is then trained from the same private state: the
answer tells nothing new. Anything else for a round that was asked, and a round before the newest that was not asked
then, is refused: five answers about one patient's gradient cost five rounds of the run.

Every state says which experiment made it, what that experiment may say of its patients' privacy, and which patients it
was trained on. The server chooses run ids, so a round is refused under an id whose files come from another experiment
or other patients: a run that claims privacy could else give away what a run without it has learned.
"""

import hashlib
import json
import logging
import math
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import safetensors.numpy
import torch
from torch import Tensor

from panfm.config.site_description import LimitsConfig
from panfm.data.packed import PackedImages
from panfm.data.store import ImageStore
from panfm.errors import DataError, LimitError, ProtocolError
from panfm.files import RoundFiles, read_checked, read_checked_start, read_digest, write_atomic, write_checked
from panfm.sharing.groups import Flat, parameter_hashes
from panfm.sharing.messages import RoundTask
from panfm.texts import PLAIN_NAME

RUNS = "runs"
"""A folder of their own: a run id comes over the wire, and may be named like a file of the site's."""
ASKED = "asked.json"
_ENDED = "ended"
FROZEN = "frozen.safetensors"
REPLY = "reply.kept"
_ORIGIN = "origin"
_SIZE_BYTES = 8
"""A safetensors file starts with the length of its header."""
_SAMPLE = 1024
"""Numbers from the middle of an image that tell it from others."""
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Origin:
    """Experiment and patients that a private state comes from."""

    experiment: str
    """Hash of the run's description, with the site's own public number of patients."""
    privacy: str
    """What the run may say of its patients' privacy."""
    patients: str
    """Fingerprint of the patients that it is trained on, and their images."""


class StateStore:
    """Private states of one run at one site."""

    def __init__(self, folder: Path, run_id: str, origin: Origin | None = None) -> None:
        """Open the states of a run: to read them, or, given their origin, to write them and train from them.

        Raises:
            ProtocolError: the run id, which came over the wire, is not a plain name.
        """
        if not PLAIN_NAME.fullmatch(run_id):
            raise ProtocolError("run id: expected lower-case letters, digits, dot, dash, underscore")
        self.folder = folder / RUNS / run_id
        self._files = RoundFiles(self.folder)
        self._origin = origin

    def check_origin(self) -> None:
        """Raises DataError if a state under this run id has another origin, or none."""
        assert self._origin is not None
        remedy = f"move {self.folder} away to start run {self.folder.name} afresh"
        for path in map(self._files.path, self._files.rounds()):
            origin = read_origin(path)
            if origin is None:
                read_checked(path)
                raise DataError(f"{path}: does not say which experiment it comes from; {remedy}")
            for name, value in asdict(self._origin).items():
                if origin.get(name) != value:
                    given = f"{origin.get(name)!s:.24}"
                    raise DataError(f"{path}: comes from {name} {given}, expected {value:.24}; {remedy}")

    def round_before(self, round_number: int) -> int:
        """The newest round before this one whose state is on disk; 0 if there is none."""
        return max((number for number in self._files.rounds() if number < round_number), default=0)

    def load(self, round_number: int) -> dict[str, Tensor]:
        """State after a round. Raises DataError, naming the file, if it is corrupted."""
        arrays = safetensors.numpy.load(read_checked(self._files.path(round_number)))
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    def save(self, round_number: int, state: dict[str, Tensor]) -> str:
        """Write the state after a round; returns its digest. The last three rounds are kept."""
        assert self._origin is not None
        metadata = {_ORIGIN: json.dumps(asdict(self._origin))}
        content = safetensors.numpy.save({name: tensor.numpy() for name, tensor in state.items()}, metadata)
        return self._files.write(round_number, content)

    def digest(self, round_number: int) -> str:
        """Digest of the state after a round, as written at the head of its file; empty if absent."""
        return read_digest(self._files.path(round_number))

    def save_frozen(self, groups: Mapping[str, Flat]) -> None:
        """Keep the shared parameters that the run does not train, packed by group."""
        write_checked(self.folder / FROZEN, safetensors.numpy.save(dict(groups)))

    def load_frozen(self) -> dict[str, Flat] | None:
        """Read the parameters that `save_frozen` wrote, packed by group; None if there are none. Raises DataError if
        they are corrupted."""
        path = self.folder / FROZEN
        return safetensors.numpy.load(read_checked(path)) if path.exists() else None


@dataclass(frozen=True)
class AskedRounds:
    """Questions that a run has asked of this site so far."""

    rounds: int
    """Of the whole run."""
    newest: float
    """Time of the newest question, in seconds since 1970."""
    digests: Mapping[int, str] = field(default_factory=dict)
    """Round -> digest of its question."""
    sums: Mapping[str, str] = field(default_factory=dict)
    """Purpose and round -> digest of the question for sums over patients."""

    @property
    def is_finished(self) -> bool:
        """Whether the last round was asked."""
        return self.rounds in self.digests


def question_digest(run_toml: str, task: RoundTask, groups: Mapping[str, Flat], state: str) -> str:
    """SHA-256 of everything that decides a round's answer.

    Args:
        run_toml: The run's resolved description.
        groups: The global parameters, whether they came whole or as a step.
        state: Digest of the private state that the round starts from.
    """
    content = [
        run_toml,
        sorted(parameter_hashes(groups).items()),
        sorted(parameter_hashes(task.teacher).items()),
        sorted((task.profile or {}).items()),
        state,
    ]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def note_question(states: StateStore, num_rounds: int, round_number: int, digest: str) -> None:
    """Note a question on disk, before it is worked on.

    Args:
        num_rounds: Of the whole run.
    Raises:
        ProtocolError: the round was asked otherwise before, or a later round was.
        DataError: the note is corrupted.
    """
    known = read_asked(states.folder)
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
    write_asked(states.folder, num_rounds, digests, known.sums if known else {})


def write_asked(folder: Path, num_rounds: int, digests: Mapping[int, str], sums: Mapping[str, str]) -> None:
    """Note the questions of a run as of now."""
    note = {"rounds": num_rounds, "newest": time.time(), "digests": digests} | ({"sums": sums} if sums else {})
    write_checked(folder / ASKED, json.dumps(note).encode())


def read_asked(folder: Path) -> AskedRounds | None:
    """Questions of a run by its folder; None before the first."""
    if not (folder / ASKED).exists():
        return None
    note = json.loads(read_checked(folder / ASKED))
    digests = {int(number): digest for number, digest in note["digests"].items()}
    return AskedRounds(note["rounds"], note["newest"], digests, note.get("sums", {}))


def fingerprint(store: ImageStore) -> str:
    """Digest of who is in the train split, with which images and labels of a task: it tells when one of them changed.

    An image counts by its shape and the numbers in its middle, which is quick whatever its size: another image shows, a
    change elsewhere in the same image may not.
    """
    digest = hashlib.sha256()
    train = store.indices("train")
    for stream in sorted(store.images):
        images, rows = store.images[stream], store.rows[stream]
        images = images.stored if isinstance(images, PackedImages) else images
        digest.update(f"{stream} {images.shape[1:]}\0".encode())
        positions = [(store.subjects[rows[position]], position) for position in np.flatnonzero(np.isin(rows, train))]
        for subject, position in sorted(positions):
            image = images[position].reshape(-1)
            start = max(len(image) - _SAMPLE, 0) // 2
            digest.update(subject.encode() + b"\0" + image[start : start + _SAMPLE].tobytes())
    if store.labels is not None:
        labelled = sorted((store.subjects[index], store.labels[index].tobytes()) for index in train)
        digest.update(b"".join(subject.encode() + b"\0" + values for subject, values in labelled))
    return digest.hexdigest()[:16]


def read_origin(path: Path) -> dict[str, str] | None:
    """The origin that a state names; None if it names none."""
    size = int.from_bytes(read_checked_start(path, _SIZE_BYTES), "little")
    header = read_checked_start(path, _SIZE_BYTES + min(size, path.stat().st_size))[_SIZE_BYTES:]
    try:
        return dict(json.loads(json.loads(header)["__metadata__"][_ORIGIN]))
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def active_runs(state_dir: Path, limits: LimitsConfig) -> dict[str, AskedRounds]:
    """Run id -> rounds it has asked for, of the runs that may ask for more."""
    folders = [path.parent for path in sorted(state_dir.glob(f"{RUNS}/*/{ASKED}"))]
    notes = {folder.name: asked for folder in folders if not is_ended(folder) and (asked := read_asked(folder))}
    oldest = time.time() - 3600.0 * limits.idle_hours
    return {name: asked for name, asked in notes.items() if not asked.is_finished and asked.newest >= oldest}


def end_run(state_dir: Path, run_id: str) -> None:
    """Mark a run as ended, so that its questions are refused. Raises DataError: the site knows no such run."""
    folder = StateStore(state_dir, run_id).folder
    if not (folder / ASKED).exists():
        raise DataError(f"{folder.parent}: run {run_id} has asked for no round here, see: panfm site status")
    write_atomic(folder / _ENDED, b"")
    (folder / REPLY).unlink(missing_ok=True)


def make_room(run_folder: Path, kept_bytes: int, limits: LimitsConfig) -> None:
    """Remove the private states of the longest idle runs until the states of the given run have room.

    At most `limits.kept-runs` runs have states, the given one included, and all states stay within `limits.state-gib`.

    Args:
        kept_bytes: Of the run's private states on disk, at most.
    Raises:
        LimitError: one of the others has been at work within `limits.idle-hours`, and may still go on.
    """
    if not run_folder.parent.exists():
        return
    others = sorted(
        (path for path in run_folder.parent.iterdir() if path.is_dir() and path != run_folder), key=_last_change
    )
    most = math.inf if run_folder.exists() else limits.kept_runs - 1
    room = limits.state_gib * 2**30 - kept_bytes
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


def is_ended(folder: Path) -> bool:
    """Whether the operator has ended the run of this folder."""
    return (folder / _ENDED).exists()


def _last_change(folder: Path) -> float:
    """Time of the last change of a run's folder or a file in it, in seconds since 1970."""
    return max(path.stat().st_mtime for path in (folder, *folder.glob("*")))


def _folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*"))
