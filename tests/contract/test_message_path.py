"""The way of a message: few functions stand between Flower's message and the trainer, in a hospital as in a simulation.

The way is read off the stack at the first optimiser step of a real round.
"""

import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from types import FrameType

import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from torch.optim.optimizer import register_optimizer_step_pre_hook

from client.app import app
from panfm.config import load_site, parse_run
from panfm.sharing.messages import RoundTask
from panfm.site.worker import Worker, listen
from tests.cases import approve
from tests.unit.site import test_private_site, test_site

MOST = 8
"""Functions of ours between Flower's call of the ClientApp and the trainer."""
TRAINERS = ("panfm.training", "panfm.privacy")


def functions(frame: FrameType | None) -> list[str]:
    """Functions of client and panfm on a stack, outermost first, comprehensions left out."""
    names = []
    while frame:
        module = str(frame.f_globals.get("__name__"))
        if module.split(".")[0] in ("client", "panfm") and not frame.f_code.co_name.startswith("<"):
            names.append(f"{module}.{frame.f_code.co_name}")
        frame = frame.f_back
    return names[::-1]


def before_the_trainer(names: list[str]) -> list[str]:
    number = next(number for number, name in enumerate(names) if name.startswith(TRAINERS))
    return names[:number]


@pytest.fixture
def stacks():
    """Functions on every thread's stack at the first optimiser step, by thread."""
    seen: dict[int, list[str]] = {}

    def look(*_):
        if not seen:
            seen.update({thread: functions(frame) for thread, frame in sys._current_frames().items()})

    hook = register_optimizer_step_pre_hook(look)
    yield seen
    hook.remove()


def message(task: RoundTask) -> Message:
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    records = task.to_records()
    arrays = {name: Array(array) for name, array in records.arrays.items()}
    made = Message(RecordDict({"a": ArrayRecord(arrays), "c": ConfigRecord(dict(records.config))}), 7, "train")
    made.metadata.__dict__["_message_id"] = "question"
    return made


@pytest.mark.slow
@pytest.mark.parametrize("make_task", [test_site.task, test_private_site.task], ids=["plain", "private"])
def test_in_a_simulation(tmp_path, write_site, stacks, make_task):
    write_site(tmp_path / "alpha", "alpha", ("brain", "heart"))
    context = Context(1, 7, {"partition-id": 0, "num-partitions": 1}, RecordDict(), {"sites": str(tmp_path)})
    assert not app(message(make_task()), context).has_error()
    way = before_the_trainer(stacks[threading.get_ident()])
    assert way[0].startswith("client.app.")
    assert len(way) <= MOST, way


@pytest.mark.parametrize("make_task", [test_site.task, test_private_site.task], ids=["plain", "private"])
def test_in_a_hospital(tmp_path, write_site, stacks, make_task):
    """The client's thread asks and waits; the worker serves in this one."""
    folder = write_site(tmp_path / "alpha", "alpha", ("brain", "heart"))
    socket = folder / ".panfm" / "run" / "worker.sock"
    approve(folder, parse_run(make_task().run_toml))
    with listen(folder, load_site(folder)) as listener, ThreadPoolExecutor(1) as pool:
        context = Context(1, 7, {"site-socket": str(socket)}, RecordDict(), {})
        reply = pool.submit(app, message(make_task()), context)
        Worker(folder, listener).serve_one()
        assert not reply.result().has_error()
    worker = before_the_trainer(stacks.pop(threading.get_ident()))
    [asking] = [names for names in stacks.values() if names and names[0].startswith("client.app.")]
    client = [name for name in asking if name.startswith("client.")]
    assert worker[0] == "panfm.site.worker.serve_one"
    assert len(client + worker) <= MOST, client + worker
