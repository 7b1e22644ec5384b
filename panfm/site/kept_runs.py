"""How many runs' private states a site keeps: a run id is the server's own word, and it may invent any number."""

import logging
import shutil
import time
from pathlib import Path

from panfm.errors import LimitError

_IDLE_S = 86_400.0
"""A run idle for a shorter time may still go on, and its state stays."""

logger = logging.getLogger(__name__)


def make_room(run_folder: Path, kept: int) -> None:
    """Make room for the state of one run beside those of `kept - 1` others; nothing to do if its folder exists.

    Raises:
        LimitError: too many runs were at work within a day.
    """
    if run_folder.exists() or not run_folder.parent.exists():
        return
    by_age = sorted((path for path in run_folder.parent.iterdir() if path.is_dir()), key=_last_change)
    for folder in by_age[: max(len(by_age) - kept + 1, 0)]:
        if time.time() - _last_change(folder) < _IDLE_S:
            raise LimitError(f"this site's limits.kept-runs ({kept}) runs were at work within a day, expected fewer")
        logger.warning("private state of run %s, idle for a day or more, is removed for a new run", folder.name)
        shutil.rmtree(folder)


def _last_change(folder: Path) -> float:
    """Of a run's folder or a file in it, in seconds."""
    return max(path.stat().st_mtime for path in (folder, *folder.glob("*")))
