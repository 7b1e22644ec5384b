"""Tells which extra of panfm has a library that is not installed."""

from collections.abc import Iterator
from contextlib import contextmanager

from panfm.errors import ConfigError

_OURS = {"panfm", "strategies", "server", "client", "simulations"}


@contextmanager
def needs_extra(extra: str) -> Iterator[None]:
    """Turn a failed import of a library into one line that names the extra of panfm to install.

    Raises:
        ConfigError: a library is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        library = (error.name or "").partition(".")[0]
        if library in _OURS:
            raise
        raise ConfigError(f"{library}: not installed, expected: pip install 'panfm[{extra}]'") from error
