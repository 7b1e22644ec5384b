"""Sends questions to many sites and collects replies until a deadline; lists sites without a reply, with the reason.

`Exchange` does this for the messages of a round or an invitation. `ask_sums` asks sites for sums over their patients
under given global parameters (panfm/sharing/sums_messages.py) and returns the answers in the order of the sites' names,
so that their sums have the same bits in any order of arrival.
"""

import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
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
from server.retrying_grid import ReplyLostError
from strategies import Memory
from strategies.round_messages import Downlink, make_array, unpack

R = TypeVar("R")
Watch = Callable[["Exchange", Mapping[int, str]], None]
"""Called with an exchange and the sites by node id when its questions are sent and when a site has answered."""


def unwatched(*_: object) -> None:
    """Watch nothing."""


logger = logging.getLogger(__name__)
ASKED_AGAIN = "asked-again"
"""Record of a reply by which a ClientApp tells that the site's worker went away (client/records.py)."""
_PUSHES = 3
_MAX_PAUSE_S = 2.0
_PAUSE_SHARE = 0.05
"""Between looks we wait this share of the time already waited: at most 5 % late, few requests."""
_LOST = frozenset({3, 4})
"""Flower's codes of messages and replies that a SuperLink has not or no longer (flwr.common.constant.ErrorCode)."""
_UNANSWERED = _LOST | {5}
"""And of a node that is gone."""


class Exchange:
    """Messages to nodes, one each; iterate over it for the good replies, then read `failed` and `seconds`.

    Replies are fetched one at a time, so that only one is in memory. A failure is put down to the node that was asked
    (Flower's own error replies name another), by the id of the message. A question that the SuperLink has lost, or
    whose reply it has, is asked again while there is time; a site that gets it twice gives the same answer twice.
    """

    def __init__(
        self,
        grid: Grid,
        messages: Iterable[Message],
        timeout_s: float,
        *,
        on_change: Callable[["Exchange"], None] = lambda _: None,
    ) -> None:
        """Send the messages.

        Args:
            on_change: Called when all are sent, and whenever a node has answered or failed.
        """
        self.failed: dict[int, str] = {}
        """Node id -> why there is no good reply."""
        self.errors: set[int] = set()
        """Node ids among them whose ClientApp answered with an error; the others did not answer."""
        self.seconds: dict[int, float] = {}
        """Node id -> seconds until its reply."""
        self.late: set[int] = set()
        """Node ids without a reply at the deadline."""
        self.worker_lost: set[int] = set()
        """Node ids with a good reply whose worker had to be asked again."""
        self._grid = grid
        self._timeout_s = timeout_s
        self.start = time.monotonic()
        self._waiting: dict[str, Message] = {}
        self._repeats: Counter[int] = Counter()
        self._on_change = on_change
        for message in messages:
            self._push(message)
        on_change(self)

    @property
    def is_waiting(self) -> bool:
        """Whether a reply may still come in time."""
        return bool(self._waiting) and self._elapsed() < self._timeout_s

    @property
    def waiting_for(self) -> set[int]:
        """Node ids without a reply so far."""
        return {message.metadata.dst_node_id for message in self._waiting.values()}

    def __iter__(self) -> Iterator[Message]:
        while self.is_waiting:
            before = len(self._waiting)
            yield from self.ready()
            if self._waiting and len(self._waiting) == before:
                time.sleep(min(_MAX_PAUSE_S, 0.01 + _PAUSE_SHARE * self._elapsed()))
        self.late = self.waiting_for
        self.failed |= dict.fromkeys(self.late, f"no reply within {self._timeout_s:g} s")
        if self.late:
            self._on_change(self)

    def ready(self) -> Iterator[Message]:
        """Yield the good replies that have arrived by now."""
        for message_id in list(self._waiting):
            for reply in self._pull(message_id):
                message = self._waiting.pop(message_id)
                node_id = message.metadata.dst_node_id
                if reply.has_error() and reply.error.code in _LOST and self._may_repeat(node_id):
                    self._push(_copy(message))
                    continue
                self.seconds[node_id] = self._elapsed()
                if reply.has_error():
                    self.failed[node_id] = one_line(reply.error.reason or f"error {reply.error.code}")
                    self.errors |= {node_id} if reply.error.code not in _UNANSWERED else set()
                elif reply.content.pop(ASKED_AGAIN, None) is not None:
                    self.worker_lost.add(node_id)
                self._on_change(self)
                if not reply.has_error():
                    yield reply

    def _pull(self, message_id: str) -> Iterable[Message]:
        """Fetch a reply. If that failed on the way, it may be lost with the SuperLink: the question is asked again."""
        message = self._waiting[message_id]
        try:
            return self._grid.pull_messages([message_id])
        except ReplyLostError:
            if not self._may_repeat(node_id := message.metadata.dst_node_id):
                del self._waiting[message_id]
                self.failed[node_id] = "its reply was lost on the way"
                return ()
            logger.warning("node %s: its reply was lost on the way", message.metadata.dst_node_id, exc_info=True)
            del self._waiting[message_id]
            self._push(_copy(message))
            return ()

    def _may_repeat(self, node_id: int) -> bool:
        self._repeats[node_id] += 1
        return self._elapsed() < self._timeout_s and self._repeats[node_id] < _PUSHES

    def _push(self, message: Message) -> None:
        """One at a time: arrays that an earlier message carried are not sent again.

        A SuperLink that died after it had taken an array, and before it could say so, refuses the array when Flower
        sends it once more. The question is then asked anew; a site that gets it twice gives the same answer twice.
        """
        node_id = message.metadata.dst_node_id
        for attempt in range(1, _PUSHES + 1):
            try:
                message_id = next(iter(self._grid.push_messages([message])), None)
            except Exception:
                if attempt == _PUSHES:
                    raise
                logger.warning("node %s: sending failed, trying again", node_id, exc_info=True)
                message = _copy(message)
            else:
                break
        if message_id:
            self._waiting[message_id] = message
        else:
            self.failed[node_id] = "the message could not be sent"

    def _elapsed(self) -> float:
        return time.monotonic() - self.start


def _copy(message: Message) -> Message:
    """Same message under another id."""
    about = message.metadata
    return Message(message.content, about.dst_node_id, about.message_type, ttl=about.ttl, group_id=about.group_id)


@dataclass(frozen=True)
class Answers:
    """Answers of the sites to one question, and the reason for each site without one."""

    replies: Mapping[str, SumsReply]
    """Site -> its answer, sorted by site name."""
    failed: Mapping[str, str]
    """Site without an answer -> the reason."""
    seconds: float

    def read(self, reader: Callable[[SumsReply], R]) -> tuple[dict[str, R], dict[str, str]]:
        """Read every answer by a function; return site -> result, and site -> reason for a refused answer."""
        read: dict[str, R] = {}
        refused: dict[str, str] = {}
        for site, reply in self.replies.items():
            try:
                read[site] = reader(reply)
            except ProtocolError as error:
                refused[site] = one_line(str(error))
        return read, refused


def check_sums_fit(run: RunConfig, embedding_size: int) -> None:
    """Raise ConfigError if the sums of the run's probe tasks are too large to solve or to fit one message."""
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
    column: str = "",
    watch: Watch = unwatched,
) -> Answers:
    """Ask sites for sums over their patients, or for an evaluation, with the global parameters of a state.

    Args:
        run: As sites are told of it.
        roster: Node id -> handshake of the sites to ask.
        frozen: Group -> its parameters that the run does not train.
        paths: Probe task -> its ridge solutions, whose errors the sites are asked for.
        column: Of the sites' label tables, to evaluate on.
    """
    model = RoundTask(state.run_id, state.round_number + 1, dump_toml(run), {})
    task = SumsTask(model, purpose, column=column)
    groups = ArrayRecord({group: make_array(flat) for group, flat in state.groups.items()})
    downlink = Downlink(groups, Memory(frozen_holders=state.memory.frozen_holders), teacher={}, frozen=frozen)
    more = ArrayRecord({name: make_array(array) for name, array in path_arrays(paths or {}).items()})

    def content(handshake: Handshake, config: ConfigRecord) -> RecordDict:
        parameters = downlink.content(handshake, config)
        return RecordDict({**parameters, "paths": more}) if paths else parameters

    return _collect(grid, run, task, roster, content, watch)


def ask_input_sums(
    grid: Grid, run: RunConfig, run_id: str, roster: Mapping[int, Handshake], *, watch: Watch = unwatched
) -> Answers:
    """Ask sites for sums of what the tokenizers read of their images; no parameters are sent.

    Args:
        run: As sites are told of it.
        roster: Node id -> handshake of the sites to ask.
    """
    task = SumsTask(RoundTask(run_id, 1, dump_toml(run), {}), Purpose.INPUTS)
    return _collect(grid, run, task, roster, lambda _, config: RecordDict({"config": config}), watch)


def _collect(
    grid: Grid,
    run: RunConfig,
    task: SumsTask,
    roster: Mapping[int, Handshake],
    content: Callable[[Handshake, ConfigRecord], RecordDict],
    watch: Watch,
) -> Answers:
    """Send a question to sites and wait for their answers.

    Args:
        content: Makes the content of a site's message from its handshake and the words of the question.
    """
    start, timeout_s = time.monotonic(), run.federation.round_timeout_s
    config = ConfigRecord(dict(task.to_records().config))

    def message(node_id: int, handshake: Handshake) -> Message:
        group_id = f"{task.purpose}-{task.model.round_number}"
        return Message(content(handshake, config), node_id, MessageType.EVALUATE, ttl=timeout_s, group_id=group_id)

    names = {node_id: handshake.site for node_id, handshake in roster.items()}
    messages = (message(*entry) for entry in roster.items())
    exchange = Exchange(grid, messages, timeout_s, on_change=lambda exchange: watch(exchange, names))
    replies: dict[str, SumsReply] = {}
    failed: dict[str, str] = {}
    for reply in exchange:
        site = names[reply.metadata.src_node_id]
        try:
            replies[site] = _read(reply, task.model)
        except ProtocolError as error:
            failed[site] = one_line(str(error))
    failed |= {
        names[node_id]: reason.removeprefix(f"site {names[node_id]}: ") for node_id, reason in exchange.failed.items()
    }
    return Answers(dict(sorted(replies.items())), dict(sorted(failed.items())), time.monotonic() - start)


def label_sums(run: RunConfig, embedding_size: int, subjects: Mapping[str, int], answers: Answers) -> "SiteSums":
    """Read the sums of features and labels from answers; a faulty answer counts as failed.

    Args:
        subjects: Site -> greatest number of training subjects that it may report.
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
    """Sums of features and labels of several sites, and the reason for each site without sums."""

    by_site: Mapping[str, Mapping[str, LabelSums]]
    """Site -> task -> sums, sorted by site name."""
    failed: Mapping[str, str]
    """Site without sums -> the reason."""

    def of_task(self, task: str) -> dict[str, LabelSums]:
        """Site -> its sums for a task; sites without sums for it are left out."""
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
