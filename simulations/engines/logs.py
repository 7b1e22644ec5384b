"""Sends the logs of sites and server to a file of the run folder; the console shows rounds, and why a run failed."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_LOGGERS = ("panfm", "client", "server")


@contextmanager
def logged_to(path: Path) -> Iterator[None]:
    """Make our loggers write to a file alone until the block ends; it appears with the first line."""
    handler = logging.FileHandler(path, encoding="utf-8", delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    for logger in loggers:
        logger.addHandler(handler)
        logger.propagate = False
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
            logger.propagate = True
        handler.close()
