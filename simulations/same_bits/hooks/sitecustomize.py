"""Hooks of the compared runs. Python imports this file at the start of every process whose PYTHONPATH names its folder.

The targets are the operating system's random numbers, `secrets` and Flower's ClientApp, none of them a name of ours, so
that a version of the code in which every module is renamed is observed in the same way.

    names       `secrets.token_hex` counts from 0, so that run ids are alike
    noise       `os.urandom` gives seeded bytes, only in a run that asks for it
    replies     every reply of a ClientApp is written to a file
    stop        the process ends, as if killed, when the first site has trained a certain round

Only calls that come from the project's own packages get seeded bytes and counted names.
"""

import importlib.util
import json
import os
import random
import secrets
import sys
import time
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

PROJECT = ("panfm", "strategies", "server", "client", "simulations")
REPLIES, SEEDED, STOP = "PANFM_SAME_BITS_REPLIES", "PANFM_SAME_BITS_SEEDED", "PANFM_SAME_BITS_STOP"
"""Environment variables: folder of the recorded replies; whether noise is seeded; round in which to stop."""
STOPPED = 86
"""Exit status of a process that was stopped."""
_CLIENT_APP = "flwr.clientapp.client_app"
_token_hex, _urandom = secrets.token_hex, os.urandom
names, noise, num_seeded_bytes = 0, random.Random(0), 0


def begin_run() -> None:
    """Start names and noise afresh."""
    global names, noise, num_seeded_bytes
    names, noise, num_seeded_bytes = 0, random.Random(0), 0


def _is_ours(frame: Any) -> bool:
    return str(frame.f_globals.get("__name__")).partition(".")[0] in PROJECT


def token_hex(nbytes: int | None = None) -> str:
    """Stand in for `secrets.token_hex`, with a counter for the project's own packages."""
    global names
    if not _is_ours(sys._getframe(1)):
        return _token_hex(nbytes)
    names += 1
    return f"{names - 1:0{2 * (nbytes or secrets.DEFAULT_ENTROPY)}x}"


def urandom(size: int, /) -> bytes:
    """Stand in for `os.urandom`, seeded for the project's own packages in a run that asks for it."""
    global num_seeded_bytes
    if not os.environ.get(SEEDED) or not _is_ours(sys._getframe(1)):
        return _urandom(size)
    num_seeded_bytes += size
    return noise.randbytes(size)


def record(reply: Any, folder: Path) -> None:
    """Write the content of a ClientApp's reply to a new file of a folder."""
    import numpy as np

    words: dict[str, Any] = {"kind": reply.metadata.message_type, "node": str(reply.metadata.src_node_id)}
    arrays: dict[str, Any] = {}
    if reply.has_error():
        words["error"] = reply.error.reason
    else:
        content = reply.content
        for record_name, record in content.array_records.items():
            arrays |= {f"{record_name}.{name}": array.numpy() for name, array in record.items()}
        words["metrics"] = {name: dict(record) for name, record in content.metric_records.items()}
        words["config"] = {name: dict(record) for name, record in content.config_records.items()}
    folder.mkdir(parents=True, exist_ok=True)
    arrays["words"] = np.frombuffer(json.dumps(words).encode(), np.uint8)
    np.savez(folder / f"{time.time_ns()}-{os.getpid()}.npz", **arrays)


def _observe(module: ModuleType) -> None:
    original = module.ClientApp.__call__

    def call(app: Any, message: Any, context: Any) -> Any:
        reply = original(app, message, context)
        if message.metadata.message_type == "train" and message.metadata.group_id == os.environ.get(STOP):
            os._exit(STOPPED)
        if folder := os.environ.get(REPLIES):
            record(reply, Path(folder))
        return reply

    module.ClientApp.__call__ = call


class _AfterImport:
    """Finder of modules that changes one module once it is imported."""

    def __init__(self, name: str, change: Callable[[ModuleType], None]) -> None:
        self.name, self.change = name, change

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec
        assert spec.loader
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            self.change(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if REPLIES in os.environ:
    secrets.token_hex, os.urandom = token_hex, urandom
    sys.meta_path.insert(0, _AfterImport(_CLIENT_APP, _observe))
