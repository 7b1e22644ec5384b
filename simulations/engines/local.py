"""Engine `local`: Flower's Grid inside this process.

The real ServerApp and ClientApp exchange real messages, one site after the other, without Ray, ports or processes.
Models and images of the sites stay in memory between rounds. The only file that touches Flower's private parts:
`Message` wants to know which task it is in, and messages get their ids from whoever carries them.
"""

import ctypes
from collections.abc import Iterable
from copy import deepcopy
from itertools import count

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from simulations.engines.job import Job
from simulations.engines.logs import logged_to

_SERVER_NODE = 1
_RUN = 1
_CLIENT_APP_RAISED = 2
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_MOST_INT = 2**31 - 1


class LocalGrid(Grid):
    """Sites in this process. A site works when its reply is asked for."""

    def __init__(self, client_app: ClientApp, num_sites: int, run_config: dict[str, str]) -> None:
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, _RUN, _SERVER_NODE
        self._client_app = client_app
        self._contexts = {
            _SERVER_NODE + 1 + index: Context(
                run_id=_RUN,
                node_id=_SERVER_NODE + 1 + index,
                node_config={"partition-id": index, "num-partitions": num_sites},
                state=RecordDict(),
                run_config=dict(run_config),
            )
            for index in range(num_sites)
        }
        self._pending: dict[str, Message] = {}
        self._ids = (f"message-{number}" for number in count(1))

    def get_node_ids(self) -> list[int]:
        """All sites, always online."""
        return list(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Keep copies until their replies are asked for."""
        ids = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = next(self._ids)
            self._pending[message.metadata.message_id] = deepcopy(message)
            ids.append(message.metadata.message_id)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Let the sites work, and return their replies."""
        return [self._reply(self._pending.pop(name)) for name in message_ids if name in self._pending]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Push, then pull; every site answers, so there is nothing to wait for."""
        return self.pull_messages(self.push_messages(messages))

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """Make a `Message`."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def set_run(self, run: Run) -> None:
        """Do nothing: there is one run."""

    @property
    def run(self) -> Run:
        """The one run of this grid."""
        return Run.create_empty(run_id=_RUN)

    def _reply(self, message: Message) -> Message:
        try:
            reply = deepcopy(self._client_app(message, self._contexts[message.metadata.dst_node_id]))
        except Exception as error:
            reply = Message(Error(_CLIENT_APP_RAISED, f"{type(error).__name__}: {error}"), reply_to=message)
        reply.metadata.__dict__["_message_id"] = next(self._ids)
        return reply


def run(job: Job) -> None:
    """Run a federation in this process."""
    from client.app import app as client_app
    from server.app import app as server_app

    _reuse_memory()
    with logged_to(job.log):
        run_apps(server_app, client_app, job)


def _reuse_memory() -> None:
    """Let glibc give large arrays the memory that earlier ones have left, which the process then keeps.

    It would map it anew for every array, page by page, which costs more than to write the array.
    """
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, _MOST_INT)


def run_apps(server_app: ServerApp, client_app: ClientApp, job: Job) -> None:
    """Run any two apps in this process."""
    grid = LocalGrid(client_app, job.num_sites, job.run_config())
    server_app(grid, Context(_RUN, _SERVER_NODE, {}, RecordDict(), dict(job.run_config())))
