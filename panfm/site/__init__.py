"""One site, without Flower: its round, its private state, what may leave it, the worker that guards it."""

from panfm.site.answer import answer
from panfm.site.site import Site, resident_site

__all__ = ["Site", "answer", "resident_site"]
