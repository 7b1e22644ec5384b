"""A session whose rounds are trained by several processes of the site, one for each device.

The worker is the process of rank 0: it alone keeps private state and makes the reply. The others open the site as the
worker did, wait for a round at a pipe, and end with the worker. They talk over the loopback interface.
"""

import os
import tempfile
import weakref
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import distributed

from panfm.config import RunConfig
from panfm.data.store import ImageStore
from panfm.errors import PanfmError
from panfm.site.session import Session
from panfm.training.gradient import TrainResult
from panfm.training.spread import SpreadTrainer

_WAIT = timedelta(minutes=30)
"""After which a process gives up another one that does not answer."""


class Processes:
    """The processes of a site besides the worker, which train its rounds with it."""

    _running: ClassVar[Callable[[], Any] | None] = None

    def __init__(self, reopen: Callable[[], Session], devices: int) -> None:
        """Start them, and wait until all have opened the site.

        Args:
            reopen: Opens the worker's session in another process.
            devices: Processes in all, the worker among them.
        Raises:
            PanfmError: one of them has ended.
        """
        if Processes._running is not None:
            Processes._running()
        if torch.cuda.is_available():
            torch.cuda.set_device(0)
        meeting = tempfile.TemporaryDirectory(prefix="panfm-devices-", ignore_cleanup_errors=True)
        place, spawn = str(Path(meeting.name) / "place"), get_context("spawn")
        self._pipes: list[Connection] = []
        processes: list[BaseProcess] = []
        self.close = Processes._running = weakref.finalize(self, _end, processes, self._pipes, meeting)
        """Ends them; a process has one group at a time."""
        for rank in range(1, devices):
            ours, theirs = spawn.Pipe()
            self._pipes.append(ours)
            words = (rank, devices, reopen, place, theirs)
            processes.append(spawn.Process(target=_work, args=words, daemon=True))
            processes[-1].start()
            theirs.close()
        self._ask_all(Connection.recv)
        _join(0, devices, place)

    def begin(self, steps: dict[str, Any]) -> None:
        """Have all of them train a round. Raises PanfmError if one has ended."""
        self._ask_all(lambda pipe: pipe.send(steps))

    def _ask_all(self, action: Callable[[Connection], Any]) -> None:
        try:
            for pipe in self._pipes:
                action(pipe)
        except (EOFError, OSError) as error:
            self.close()
            raise PanfmError("limits.devices: one of the site's processes has ended; its own lines tell why") from error


class RankZero(SpreadTrainer):
    """The worker's trainer, which starts the other processes with its first round."""

    def __init__(self, start: Callable[[], Processes], run: RunConfig, streams: Sequence[str] | None = None) -> None:
        super().__init__(run, streams)
        self._start_processes = start
        self._processes: Processes | None = None

    def train(self, store: ImageStore, indices: NDArray[np.int64], **steps: Any) -> TrainResult:
        """Train a round with all processes; after an error they end, and the next round starts others."""
        try:
            if self._processes is None or not self._processes.close.alive:
                self._processes = self._start_processes()
            self._processes.begin({name: value for name, value in steps.items() if name != "on_step"})
            return super().train(store, indices, **steps)
        except BaseException:
            if self._processes is not None:
                self._processes.close()
            self._processes = None
            raise


def spread_session(reopen: Callable[[], Session], devices: int, session: Callable[..., Session]) -> Session:
    """A session with a trainer that spreads its steps.

    Args:
        reopen: Opens it in another process; can be pickled.
        session: Makes the session, given how to make its trainer.
    """
    return session(make_trainer=partial(RankZero, partial(Processes, reopen, devices)))


def _work(rank: int, devices: int, reopen: Callable[[], Session], place: str, pipe: Connection) -> None:
    """Open the site, and train rounds with the worker until it hangs up."""
    if torch.cuda.is_available():
        torch.cuda.set_device(rank)
    session = reopen()
    torch.set_num_threads(session.run.train.threads)
    trainer = session.trainer
    assert isinstance(trainer, SpreadTrainer)
    pipe.send(None)
    _join(rank, devices, place)
    while True:
        try:
            steps = pipe.recv()
        except EOFError:
            return
        SpreadTrainer.train(trainer, session.store, session.store.indices("train"), **steps)


def _join(rank: int, devices: int, place: str) -> None:
    """Meet the other processes at a file that no other account can read."""
    for library in ("GLOO", "NCCL"):
        os.environ.setdefault(f"{library}_SOCKET_IFNAME", "lo")
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    meeting = f"file://{place}"
    distributed.init_process_group(backend, init_method=meeting, rank=rank, world_size=devices, timeout=_WAIT)
    distributed.barrier()


def _end(processes: list[BaseProcess], pipes: list[Connection], meeting: tempfile.TemporaryDirectory[str]) -> None:
    for pipe in pipes:
        pipe.close()
    for process in processes:
        process.kill()
        process.join()
    if distributed.is_initialized():
        distributed.destroy_process_group()
    meeting.cleanup()
