"""One site, without Flower: its rounds, private state, limits, budget and audit log, and the worker at its socket.

The names below are imported when they are asked for: a command that reads a ledger or a log needs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from panfm.site.handler import answer
    from panfm.site.resident import resident_site
    from panfm.site.site import Site

__all__ = ["Site", "answer", "resident_site"]

_MODULES = {"Site": "panfm.site.site", "answer": "panfm.site.handler", "resident_site": "panfm.site.resident"}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)
