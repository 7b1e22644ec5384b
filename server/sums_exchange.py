"""Asks sites for sums over their patients under given global parameters, and reads the answers.

ask -> one message for each site that is there    panfm/sharing/sums_messages.py
    -> answers by site, in the order of their names, so that sums have the same bits in any order of arrival
"""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import safetensors.numpy
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid
from numpy.typing import NDArray

from panfm.config import RunConfig, dump_toml
from panfm.errors import ConfigError, ProtocolError, one_line
from panfm.evaluate.label_sums import MAX_FEATURES, LabelSums
from panfm.files import read_checked, write_checked
from panfm.models.sizes import sizes_of
from panfm.sharing.frames import MAX_ARRAYS
from panfm.sharing.groups import Flat
from panfm.sharing.messages import Handshake, RoundTask
from panfm.sharing.sums_messages import Parts, Purpose, SumsReply, SumsTask, path_arrays
from server.checkpoint import ServerState
from server.exchange import Exchange
from strategies import Memory
from strategies.round_messages import Downlink, make_array, unpack

R = TypeVar("R")


@dataclass(frozen=True)
class Answers:
    """Answers of the sites to one question, and why others have none."""

    replies: Mapping[str, SumsReply]
    """Site -> its answer, in the order of names."""
    failed: Mapping[str, str]
    """Site -> why it has none."""
    seconds: float

    def read(self, reader: Callable[[SumsReply], R]) -> tuple[dict[str, R], dict[str, str]]:
        """Read every answer; returns what was read, and why answers were refused, by site."""
        read: dict[str, R] = {}
        refused: dict[str, str] = {}
        for site, reply in self.replies.items():
            try:
                read[site] = reader(reply)
            except ProtocolError as error:
                refused[site] = one_line(str(error))
        return read, refused


def check_sums_fit(run: RunConfig, embedding_size: int) -> None:
    """Raise ConfigError if the sums of the run's tasks are too large to be solved, or for one message."""
    if not run.probe.tasks:
        return
    if embedding_size > MAX_FEATURES:
        raise ConfigError(
            f"probe.tasks: embeddings have {embedding_size} numbers, expected at most {MAX_FEATURES}; set "
            'features.pooling, e.g. "cls+mean"'
        )
    if (size := sizes_of(run).probe_bytes) > MAX_ARRAYS:
        raise ConfigError(f"probe.tasks: sums of {size:,} bytes, expected at most {MAX_ARRAYS:,}: fewer tasks")


def ask_sums(
    grid: Grid,
    run: RunConfig,
    state: ServerState,
    roster: Mapping[int, Handshake],
    purpose: Purpose,
    *,
    frozen: Mapping[str, Flat],
    paths: Mapping[str, Parts] | None = None,
) -> Answers:
    """Ask sites for sums under the global parameters of a state.

    Args:
        run: As sites are told of it.
        roster: Node id -> handshake of the sites to ask.
        frozen: Group -> its parameters that the run does not train.
        paths: Task of labels -> its ridge path, to ask for errors.
    """
    start, timeout_s = time.monotonic(), run.federation.round_timeout_s
    model = RoundTask(state.run_id, state.round_number + 1, dump_toml(run), {})
    config = ConfigRecord(dict(SumsTask(model, purpose).to_records().config))
    groups = ArrayRecord({group: make_array(flat) for group, flat in state.groups.items()})
    downlink = Downlink(groups, Memory(frozen_holders=state.memory.frozen_holders), teacher={}, frozen=frozen)
    more = ArrayRecord({name: make_array(array) for name, array in path_arrays(paths or {}).items()})

    def message(node_id: int, handshake: Handshake) -> Message:
        content = downlink.content(handshake, config)
        content = RecordDict({**content, "paths": more}) if paths else content
        group_id = f"{purpose}-{model.round_number}"
        return Message(content, node_id, MessageType.EVALUATE, ttl=timeout_s, group_id=group_id)

    exchange = Exchange(grid, (message(*entry) for entry in roster.items()), timeout_s)
    names = {node_id: handshake.site for node_id, handshake in roster.items()}
    replies: dict[str, SumsReply] = {}
    failed: dict[str, str] = {}
    for reply in exchange:
        site = names[reply.metadata.src_node_id]
        try:
            replies[site] = _read(reply, model)
        except ProtocolError as error:
            failed[site] = one_line(str(error))
    failed |= {
        names[node_id]: reason.removeprefix(f"site {names[node_id]}: ") for node_id, reason in exchange.failed.items()
    }
    return Answers(dict(sorted(replies.items())), dict(sorted(failed.items())), time.monotonic() - start)


def label_sums(run: RunConfig, embedding_size: int, subjects: Mapping[str, int], answers: Answers) -> "SiteSums":
    """Read the sums of features and labels from answers.

    Args:
        subjects: Site -> most training subjects that it may have.
    """

    def read(reply: SumsReply) -> dict[str, LabelSums]:
        if unknown := sorted(set(reply.sums) - set(run.probe.tasks)):
            raise ProtocolError(f"label sums of {unknown[0]!r:.80}, which the run does not name")
        if not reply.sums:
            raise ProtocolError("label sums: of no task")
        return {
            task: LabelSums.from_arrays(parts, features=embedding_size, labels=len(run.probe.tasks[task]))
            for task, parts in reply.sums.items()
        }

    sums, refused = answers.read(read)
    for site in list(sums):
        most = max(float(of_task.count) for of_task in sums[site].values())
        if most > subjects[site]:
            del sums[site]
            refused[site] = f"label sums: of {most:g} patients, the site has {subjects[site]}"
    return SiteSums(sums, {**answers.failed, **refused})


@dataclass(frozen=True)
class SiteSums:
    """Sums of features and labels of several sites."""

    by_site: Mapping[str, Mapping[str, LabelSums]]
    """Site -> task -> its sums, in the order of names."""
    failed: Mapping[str, str]
    """Site -> why it gave none."""

    def of_task(self, task: str) -> dict[str, LabelSums]:
        """Site -> its sums of a task; without sites that gave none."""
        return {site: sums[task] for site, sums in self.by_site.items() if task in sums}


def keep_sums(path: Path, sums: SiteSums) -> None:
    """Write sums of several sites to a file."""
    arrays = {
        f"{site}/{task}/{part}": array
        for site, tasks in sums.by_site.items()
        for task, of_task in tasks.items()
        for part, array in of_task.to_arrays().items()
    }
    write_checked(path, safetensors.numpy.save(arrays, {"failed": json.dumps(dict(sums.failed))}))


def read_sums(path: Path) -> SiteSums | None:
    """Read what `keep_sums` wrote; None if there is no such file. Raises DataError: it is damaged."""
    if not path.exists():
        return None
    content = read_checked(path)
    size = int.from_bytes(content[:8], "little")
    failed = json.loads(json.loads(content[8 : 8 + size])["__metadata__"]["failed"])
    parts: dict[str, dict[str, dict[str, NDArray[np.float64]]]] = {}
    for name, array in sorted(safetensors.numpy.load(content).items()):
        site, task, part = name.split("/")
        parts.setdefault(site, {}).setdefault(task, {})[part] = array
    by_site = {site: {task: LabelSums(**parts) for task, parts in tasks.items()} for site, tasks in parts.items()}
    return SiteSums(by_site, failed)


def _read(reply: Message, model: RoundTask) -> SumsReply:
    answer = SumsReply.from_records(unpack(reply.content))
    if (answer.run_id, answer.round_number) != (model.run_id, model.round_number):
        raise ProtocolError(f"answers {answer.run_id} before round {answer.round_number}, not the question")
    return answer
