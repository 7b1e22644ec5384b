"""One site, without Flower: its round, its private state, what may leave it."""

from panfm.site.scrub import scrub
from panfm.site.site import Site, resident_site

__all__ = ["Site", "resident_site", "scrub"]
