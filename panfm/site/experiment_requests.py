"""Descriptions of the experiments that have asked a site: `<state folder>/requests/<hash>.toml`.

The worker keeps each description when it is first asked for, so that the operator can read it, compare it with others
and decide (approvals.py). The SHA-256 of a file is its name. At most twenty without a decision are kept.
"""

import hashlib
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from panfm.config import RunConfig, as_told, dump_toml, parse_run
from panfm.files import write_atomic

FOLDER = "requests"
_MOST_PENDING = 20


@dataclass(frozen=True)
class ExperimentRequest:
    """One experiment that has asked the site."""

    experiment: str
    """Hash of its description."""
    path: Path
    """File that holds the description."""
    asked: float
    """When it first asked, in seconds since 1970."""

    def read(self) -> RunConfig:
        """The description. Raises ConfigError: this version of panfm does not read it."""
        return parse_run(self.path.read_text(encoding="utf-8"))


def keep_request(state_dir: Path, run: RunConfig, experiment: str, decided: Collection[str]) -> None:
    """Keep the description of an experiment that asks, if it is not kept yet.

    Args:
        experiment: Its hash.
        decided: Experiments with a decision, whose descriptions stay.
    """
    path = state_dir / FOLDER / f"{experiment}.toml"
    if _is_whole(path):
        return
    pending = [request for request in read_requests(state_dir) if request.experiment not in {*decided, experiment}]
    for request in pending[: max(0, len(pending) + 1 - _MOST_PENDING)]:
        request.path.unlink(missing_ok=True)
    write_atomic(path, dump_toml(as_told(run)).encode())


def read_requests(state_dir: Path) -> list[ExperimentRequest]:
    """List the experiments that have asked, the oldest first. A file that is not what was written is left out."""
    paths = [path for path in state_dir.glob(f"{FOLDER}/*.toml") if _is_whole(path)]
    requests = [ExperimentRequest(path.stem, path, path.stat().st_mtime) for path in paths]
    return sorted(requests, key=lambda request: (request.asked, request.experiment))


def _is_whole(path: Path) -> bool:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest() == path.stem
    except OSError:
        return False
