"""The run folder: all files of one run.

run.toml           the resolved description
start.safetensors  the shared parameters that it starts from, where it is a warm start
frozen.safetensors the shared parameters that it does not train, packed by group, where there are any
alerts.toml        whom the server tells of events, if the coordinator has said so (alerts_config.py)
alerts.jsonl       which events were told (alerts.py)
expected-sites.csv    the coordinator's table of expected sites, if there is one
inputs.json        constants of the tokenizers' inputs, and sites whose sums they come from, in a run that asks for sums
sites.json         handshakes, coverage, and who cannot take part
rounds.jsonl       one line per round
events.jsonl       the history: starts, failures, sites that were missing; lines are only added (events.py)
ended.json         how and why the run ended without a model
checkpoint/        the server's state after the last rounds, and run.toml as it was in its first round
model/             model.safetensors, metadata.json, run.toml; with probe.tasks probe.safetensors; with [task] task.json
                   and head.safetensors
status.html, tensorboard/, mlflow.db, mlflow/, wandb/   for people (tracking.py)
probe.json         scores of held-out subjects, in a simulation (panfm/evaluate/result.py)
evaluation.json    scores of the model on the sites' own labels, if the coordinator has asked for them (evaluation.py)
report.json        parts of the report that need images, in a simulation (panfm/report/report_data.py)
report.html        the report (panfm/report/report_page.py)
flower.json        where Flower runs it (server/coordinator.py)
"""

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import safetensors.numpy
from safetensors import SafetensorError
from torch import Tensor

from panfm import __version__
from panfm.config import RunConfig, as_told, dump_toml, experiment_hash, load_run, without_summed_constants
from panfm.config.differences import check_same_run
from panfm.errors import DataError, PanfmError, RunError, reason
from panfm.evaluate.input_sums import Constants, with_constants
from panfm.evaluate.probe_file import save_probes
from panfm.files import locked, open_atomic, read_checked, write_atomic, write_checked
from panfm.finetune.federated_head import write_head
from panfm.models import describe_model
from panfm.models.packing import frozen_manifest, trained_manifest
from panfm.models.warm_start import read_start, start_state, with_start_parameters
from panfm.outputs import append_json_line, check_place, json_text, read_json_lines, write_json
from panfm.privacy.guarantees import checked_run, load_checked_run, privacy_label
from panfm.report.run_events import EventKind
from panfm.sharing.groups import Flat, GroupManifest
from panfm.sharing.messages import Handshake
from server.alerts_config import FILE as ALERTS
from server.checkpoint import ServerState, load_latest, save_state
from server.events import EventLog
from server.expected_sites import FILE as EXPECTED_SITES
from server.expected_sites import ExpectedSites
from server.handshake import Attendance
from server.label_probe import LabelProbes
from server.quorum import NoQuorumError
from server.retrying_grid import ReplyLostError
from server.tracking_config import tracking_of

_START = "start.safetensors"
_FROZEN = "frozen.safetensors"
ENDED = "ended.json"
INPUTS = "inputs.json"
LOCK = ".lock"
"""Held by the process that is at work in the folder."""
_LOCK_WAIT_S = 10.0
"""A server that was killed may leave a process that ends a little later."""


def default_path(name: str) -> Path:
    """Where the folder of a run of this name lies unless it is told otherwise: `runs/<name>-<time>`."""
    return Path(f"runs/{name}-{time.strftime('%Y%m%d-%H%M%S')}")


class DiskError(RunError):
    """The disk does not take a file of the run."""


class RunFolder:
    """Reads and writes the folder of one run."""

    def __init__(self, path: Path, run: RunConfig) -> None:
        self.path = path
        self.run = run

    @property
    def shared_run(self) -> RunConfig:
        """The description as sites are told of it."""
        return as_told(self.run)

    @cached_property
    def events(self) -> EventLog:
        """The history of the run. Raises DataError if its file is damaged."""
        return EventLog(self.path)

    @staticmethod
    def check_new(path: Path, run: RunConfig) -> None:
        """Check before any work for a run that its folder can be made and that its loggers are installed.

        Raises:
            RunError: the folder holds a run already, or cannot be written.
            ConfigError: `[tracking]` is not valid, or names a logger that is not installed.
        """
        tracking_of(run)
        try:
            if (path / "checkpoint").exists():
                raise RunError(f"{path}: holds a run already; resume it or choose another folder")
            check_place(path)
        except OSError as error:
            raise RunError(f"{path}: cannot be made a run folder ({reason(error)})") from error

    @classmethod
    def create(cls, path: Path, run: RunConfig) -> Self:
        """Start a new run.

        Raises:
            RunError: the folder holds one already, or cannot be written to.
            ConfigError: the run cannot keep the privacy that it promises, or `[tracking]` does not hold.
            ConfigError, DataError: the model that the run starts from does not fit.
        """
        run = checked_run(run)
        cls.check_new(path, run)
        run, weights = with_start(run)
        try:
            path.mkdir(parents=True, exist_ok=True)
            with _alone_in(path):
                if weights is not None:
                    write_atomic(path / _START, weights)
                write_atomic(path / "run.toml", dump_toml(run).encode())
                (path / "rounds.jsonl").write_bytes(b"")
        except OSError as error:
            raise RunError(f"{path}: cannot be made a run folder ({reason(error)})") from error
        return cls(path, run)

    @classmethod
    def resume(cls, path: Path) -> Self:
        """Open a run to go on with it, as it was described.

        Raises:
            ConfigError: the folder holds none, one that cannot keep the privacy that it promises, or one that was
                edited since the run began.
            RunError: another process is at work in it.
        """
        folder = cls(path, load_checked_run(path / "run.toml"))
        if (bound := path / "checkpoint" / "run.toml").exists():
            began = load_run(bound)
            if folder.run.summed_streams:  # killed while they were written, or before
                began = without_summed_constants(began)
            check_same_run(path / "run.toml", folder.run, began)
        with _alone_in(path):
            done = state.round_number if (state := folder.latest_state()) else 0
            rounds = path / "rounds.jsonl"
            kept = [line for line in read_json_lines(rounds) if line["round"] <= done]
            write_atomic(rounds, "".join(f"{json_text(line)}\n" for line in kept).encode())
        return folder

    def start(self) -> dict[str, Tensor] | None:
        """The shared parameters that the run starts from, by name; None without a warm start. Raises DataError if they
        are not those of the description."""
        if self.run.start is None:
            return None
        path = self.path / _START
        try:
            content = path.read_bytes()
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror}), expected the weights of the start") from error
        return start_state(self.run, content)

    def frozen(self) -> dict[str, Flat]:
        """Packed parameters that the run does not train; empty before they are kept. Raises DataError if damaged."""
        path = self.path / _FROZEN
        return safetensors.numpy.load(read_checked(path)) if path.exists() else {}

    def keep_frozen(self, groups: Mapping[str, Flat]) -> dict[str, Flat]:
        """Write and return packed parameters that the run does not train; nothing if there are none. Raises RunError as
        `save_state` does."""
        if groups:
            with _written(self.path / _FROZEN):
                write_checked(self.path / _FROZEN, safetensors.numpy.save(dict(groups)))
        return dict(groups)

    def keep_alerts(self, alerts: str) -> None:
        """Keep the coordinator's description of alerts, for this account alone."""
        with open_atomic(self.path / ALERTS, mode=0o600) as file:
            file.write(alerts.encode())

    def expect(self, sites: ExpectedSites) -> None:
        """Keep the coordinator's table of sites."""
        write_atomic(self.path / EXPECTED_SITES, sites.to_csv().encode())

    def expected_sites(self) -> ExpectedSites | None:
        """The coordinator's table; None if there is none. Raises DataError if it is damaged."""
        path = self.path / EXPECTED_SITES
        return ExpectedSites.read(path) if path.exists() else None

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Lock the folder until the block ends; if it fails, write down why.

        Raises:
            RunError: another process is at work in it.
        """
        with _alone_in(self.path):
            with suppress(PanfmError):
                self.events.note_told_end(self.path / ENDED)
            (self.path / ENDED).unlink(missing_ok=True)
            try:
                yield
            except Exception as error:
                self.note_end(**_end(error))
                raise

    def note_end(self, reason: str, *, state: str = "failed", can_heal: bool = False) -> None:
        """Write into `ended.json`, and add to the history, why the run ended without a model; errors of the disk are
        ignored.

        Args:
            can_heal: The run may get further if it is resumed as it is.
        """
        _note_end(self.path, lambda: self.events, reason, state, can_heal)

    def describe(self) -> None:
        """Write the description anew, for a run that has begun. Raises RunError as `save_state` does."""
        for path in (self.path / "checkpoint" / "run.toml", self.path / "run.toml"):
            with _written(path):
                write_atomic(path, dump_toml(self.run).encode())

    def fill_in_constants(
        self, constants: Mapping[str, Constants], sites: Mapping[str, Sequence[str]], left_out: Mapping[str, str]
    ) -> None:
        """Write constants of streams' inputs into the description, and into inputs.json where they come from.

        Args:
            sites: Stream -> sites whose sums are in its constants.
            left_out: Site without sums -> the reason.
        Raises:
            RunError: as `save_state`.
        """
        self.run = with_constants(self.run, constants)
        streams = {
            name: {"input-centre": centre, "input-scale": scale, "sites": list(sites[name])}
            for name, (centre, scale) in constants.items()
        }
        with _written(self.path / INPUTS):
            write_json(self.path / INPUTS, {"streams": streams, "left-out": dict(left_out)}, indent=2)
        self.describe()

    def latest_state(self) -> ServerState | None:
        """The last checkpoint, if there is one."""
        return load_latest(self.path / "checkpoint")

    def save_state(self, state: ServerState) -> None:
        """Write a checkpoint. Raises RunError if the disk does not take it."""
        with _written(self.path / "checkpoint" / f"round-{state.round_number:06d}.state"):
            if not (bound := self.path / "checkpoint" / "run.toml").exists():
                write_atomic(bound, dump_toml(self.run).encode())
            save_state(self.path / "checkpoint", state)

    def kept_sums(self, round_number: int) -> Path:
        """Path of the file that keeps the sums for probes of a round's model until the model is saved."""
        return self.path / "checkpoint" / f"label-sums-{round_number:06d}.safetensors"

    def final_state(self) -> tuple[ServerState, dict[str, Flat]]:
        """The model of a finished run, and its parameters that the run did not train, packed by group. Raises DataError
        if a file of the model is damaged."""
        path, model = self.path / "model", describe_model(self.run)
        try:
            tensors = safetensors.numpy.load((path / "model.safetensors").read_bytes())
            words = json.loads((path / "metadata.json").read_text(encoding="utf-8"))
            layouts = trained_manifest(model, self.run.sharing), frozen_manifest(model, self.run.sharing)
            trained, frozen = (layout.pack_all(tensors) for layout in layouts)
            return ServerState(str(words["run-id"]), int(words["rounds"]), trained), frozen
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise DataError(f"{path}: expected the model of a finished run ({reason(error)})") from error

    def append_round(self, line: Mapping[str, Any]) -> None:
        """Add a line to rounds.jsonl; numbers that are not finite become null. Raises RunError as `save_state` does."""
        with _written(self.path / "rounds.jsonl"):
            append_json_line(self.path / "rounds.jsonl", line)

    def rounds(self) -> list[dict[str, Any]]:
        """The rounds done so far, as `append_round` was given them."""
        return read_json_lines(self.path / "rounds.jsonl")

    def save_sites(self, attendance: Attendance) -> None:
        """Write sites.json, with those that cannot take part."""
        roster = attendance.roster
        sites = {
            handshake.site: {
                "subjects": handshake.subjects or None,
                "streams": {stream: count or None for stream, count in handshake.streams.items()},
                "versions": dict(handshake.versions),
                "groups": list(handshake.group_hashes),
            }
            for handshake in roster.values()
        }
        failed = attendance.misfits + attendance.failed
        content = {
            "privacy": privacy_label(self.run),
            "sites": sites,
            "coverage": coverage(self.run.streams, list(roster.values())),
            "failed": failed,
        }
        write_json(self.path / "sites.json", content, indent=2)

    def save_model(
        self,
        state: ServerState,
        manifest: GroupManifest,
        frozen: Mapping[str, Flat],
        sites: list[str],
        probes: LabelProbes | None = None,
    ) -> None:
        """Write model/: the global parameters by name, those that the run did not train included, probes of labels
        and the head of a task where there are any, and what they are."""
        untrained = frozen_manifest(describe_model(self.run), self.run.sharing)
        tensors = manifest.unpack_all(state.groups) | untrained.unpack_all(frozen)
        write_atomic(self.path / "model" / "model.safetensors", safetensors.numpy.save(tensors))
        write_atomic(self.path / "model" / "run.toml", dump_toml(self.shared_run).encode())
        if self.run.task is not None:
            write_head(self.path / "model", self.run.task, tensors)
        if probes and probes.probes:
            save_probes(self.path / "model", probes.probes, self.run.features.pooling_text)
        metadata = {
            "name": self.run.name,
            "run-id": state.run_id,
            "experiment": experiment_hash(self.run),
            "rounds": state.round_number,
            "sites": sites,
            "streams": {
                name: stream.model_dump(mode="json", exclude_none=True) for name, stream in self.run.streams.items()
            },
            "parameters": {group: manifest.size(group) for group in manifest.groups},
            "frozen-parameters": {group: untrained.size(group) for group in untrained.groups},
            "privacy": privacy_label(self.run),
            "pooling": self.run.features.pooling_text,
            "start": self.run.start and self.run.start.sha256,
            "panfm": __version__,
            "intended-use": "research; not a medical device",
        }
        if self.run.task is not None:
            metadata["task"] = self.run.task.label
        if state.measure:
            metadata["gate"] = {"measure": state.measure.value, "round": state.measure.round_number}
        if self.run.probe.tasks and probes:
            metadata["probe"] = probes.summary()
        write_json(self.path / "model" / "metadata.json", metadata, indent=2)


def with_start(run: RunConfig) -> tuple[RunConfig, bytes | None]:
    """Return a run with the hashes of what it starts from, and those weights; None without a warm start. Raises
    ConfigError, DataError: the model that it starts from does not fit."""
    if run.start is None:
        return run, None
    weights = read_start(run)
    return with_start_parameters(run, weights), weights


@contextmanager
def early_end_noted(resumed: str | None) -> Iterator[None]:
    """Write down, as `RunFolder.note_end`, why a run could not be opened or its alerts not begun.

    Args:
        resumed: Folder of the run; None: one that is yet to be made, of which there is nothing to tell.
    """
    try:
        yield
    except Exception as error:
        if resumed and (path := Path(resumed)).is_dir():
            with suppress(OSError), locked(path / LOCK, wait_s=0.0):  # another process at work there tells its own end
                _note_end(path, lambda: EventLog(path), state="failed", **_end(error))
        raise


def _note_end(path: Path, events: Callable[[], EventLog], reason: str, state: str, can_heal: bool) -> None:
    with suppress(PanfmError):
        events().note(EventKind(state), reason)
    with suppress(OSError):
        write_json(path / ENDED, {"state": state, "reason": reason, "can-heal": can_heal}, indent=2)


def _end(error: Exception) -> dict[str, Any]:
    """Why an error ends a run, and whether it can heal."""
    if isinstance(error, PanfmError):
        return {"reason": str(error), "can_heal": _can_heal(error)}
    return {"reason": f"internal error ({type(error).__name__}); the server's log tells more", "can_heal": True}


@contextmanager
def _written(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DiskError(f"{path}: cannot be written ({error.strerror}); the run can be resumed") from error


def _can_heal(error: PanfmError) -> bool:
    return isinstance(error, DiskError | ReplyLostError) or (isinstance(error, NoQuorumError) and error.can_heal)


@contextmanager
def _alone_in(path: Path) -> Iterator[None]:
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(path / LOCK, wait_s=_LOCK_WAIT_S))
        except BlockingIOError as error:
            raise RunError(f"{path}: another process is at work in this run folder") from error
        except PermissionError as error:
            raise RunError(f"{path}: not writable for this account, expected the ServerApp's") from error
        yield


def coverage(streams: Iterable[str], handshakes: Sequence[Handshake]) -> dict[str, dict[str, int | None]]:
    """Stream -> site that holds it -> subjects; null where withheld."""
    return {
        stream: {
            handshake.site: handshake.streams[stream] or None for handshake in handshakes if stream in handshake.streams
        }
        for stream in streams
    }
