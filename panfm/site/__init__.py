"""One site, without Flower: its rounds, private state, limits, budget and audit log, and the worker at its socket."""

from panfm.site.handler import answer
from panfm.site.site import Site, resident_site

__all__ = ["Site", "answer", "resident_site"]
