"""What sites and server log goes into a file of the run folder; the console is for the rounds and for one reason."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_LOGGERS = ("panfm", "client", "server")


@contextmanager
def logged_to(path: Path) -> Iterator[None]:
    """Meanwhile our loggers write to a file, which appears with the first line, and nowhere else."""
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
