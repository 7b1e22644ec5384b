"""Federations that can be killed: run as a script, in a process of its own; used by test_chaos.py.

    chaos_run.py             reads jobs, one JSON object per line, and answers each with the exit code of its process:
                             the server, forked from this one; every site's round runs in a process forked from that
    chaos_run.py ray JOB     one job on Ray

A job: {"sites", "run_dir", "victim": "server" or a site's name or "", "round", "events" or "seconds"}. The victim kills
itself (SIGKILL) at the so-many-th file that it opens, renames or removes in the run folder, or so many seconds after it
began; a site counts from the round's start.
"""

import contextlib
import json
import os
import pickle
import signal
import sys
import threading
from pathlib import Path
from typing import Any

from simulations.engines.offline import go_offline

os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # who forks must not have threads
go_offline()

import numpy as np  # noqa: E402
from flwr.app import Context, Message  # noqa: E402
from flwr.clientapp import ClientApp  # noqa: E402

from client.app import app as client_app  # noqa: E402
from panfm.config import site_folders  # noqa: E402
from panfm.config.site_description import LimitsConfig  # noqa: E402
from panfm.errors import PanfmError  # noqa: E402
from panfm.site import worker  # noqa: E402
from server.app import app as server_app  # noqa: E402
from simulations.engines.job import Job  # noqa: E402
from simulations.engines.local import run_apps  # noqa: E402
from strategies.exact_mean import ExactMean, Votes  # noqa: E402

_FILE_EVENTS = ("open", "os.rename", "os.remove", "os.mkdir")


def light_fuse(job: dict[str, Any]) -> None:
    """This process will kill itself; processes that it forks will not."""
    this = os.getpid()

    def kill() -> None:
        os.kill(this, signal.SIGKILL)

    if "seconds" in job:
        timer = threading.Timer(job["seconds"], kill)
        timer.daemon = True
        timer.start()
        return
    left = [job["events"]]

    def count(event: str, args: tuple[Any, ...]) -> None:
        if os.getpid() == this and event in _FILE_EVENTS and str(args[0]).startswith(job["run_dir"]):
            left[0] -= 1
            if left[0] <= 0:
                kill()

    sys.addaudithook(count)


def is_victim(job: dict[str, Any], message: Message, context: Context) -> bool:
    site = site_folders(Path(job["sites"]))[int(context.node_config["partition-id"])].name
    return (site, message.metadata.group_id) == (job["victim"], str(job["round"]))


class ForkedSites(ClientApp):
    """The real ClientApp; every message is answered in a process of its own, with nothing warm."""

    def __init__(self, job: dict[str, Any]) -> None:
        super().__init__()
        self.job = job

    def __call__(self, message: Message, context: Context) -> Message:
        reading, writing = os.pipe()
        if not (pid := os.fork()):
            os.close(reading)
            if is_victim(self.job, message, context):
                light_fuse(self.job)
            with os.fdopen(writing, "wb") as pipe:
                pipe.write(pickle.dumps(client_app(message, context)))
            os._exit(0)
        os.close(writing)
        with os.fdopen(reading, "rb") as pipe:
            answer = pipe.read()
        _, status = os.waitpid(pid, 0)
        if status:
            raise RuntimeError(f"the site's process ended with {status}")
        reply: Message = pickle.loads(answer)
        return reply


class MortalWorkers(ClientApp):
    """The ClientApp in Ray's worker, which the victim takes with it."""

    def __init__(self, inner: ClientApp, job: dict[str, Any]) -> None:
        super().__init__()
        self.inner = inner
        self.job = job

    def __call__(self, message: Message, context: Context) -> Message:
        if is_victim(self.job, message, context):
            light_fuse(self.job)
        return self.inner(message, context)


def work(job: dict[str, Any]) -> int:
    """0: the run is done; 3: it ended with one line that says why."""
    if job["victim"] == "server":
        light_fuse(job)
    try:
        run_apps(server_app, ForkedSites(job), Job(Path(job["sites"]), Path(job["run_dir"])))
    except PanfmError as error:
        sys.stderr.write(f"{error}\n")
        return 3
    return 0


def compile_mean() -> None:
    """Compile the exact mean for updates that may be written to, and for those that may not."""
    for writeable in (True, False):
        update = np.ones(8, np.float32)
        update.flags.writeable = writeable
        mean = ExactMean(((8, 0),), weight_limit=1.0, votes=Votes(np.zeros(8, np.int8), np.zeros(8, np.int8)))
        mean.add(update, (1.0,))
        mean.mean()


def serve() -> None:
    """Fork a server for each job. Libraries are imported and the mean is compiled once, before any fork."""
    worker.load_libraries(LimitsConfig())
    compile_mean()
    for line in sys.stdin:
        if not (pid := os.fork()):
            os.setpgid(0, 0)
            os._exit(work(json.loads(line)))
        _, status = os.waitpid(pid, 0)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)  # a site that outlived its server
        sys.stdout.write(f"{os.waitstatus_to_exitcode(status)}\n")
        sys.stdout.flush()


def on_ray(job: dict[str, Any]) -> None:
    """One job with Ray's workers as sites."""
    from simulations.engines import ray

    if job["victim"] == "server":
        light_fuse(job)
    real = ray._ConfiguredClient
    ray._ConfiguredClient = lambda described: MortalWorkers(real(described), job)
    ray.run(Job(Path(job["sites"]), Path(job["run_dir"])))


if __name__ == "__main__":
    serve() if len(sys.argv) == 1 else on_ray(json.loads(sys.argv[2]))
