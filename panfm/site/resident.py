"""Sites of a simulation, kept open between rounds."""

from functools import lru_cache
from pathlib import Path

from panfm.site.site import Site


@lru_cache(maxsize=64)
def resident_site(folder: Path, state_dir: Path | None = None) -> Site:
    """The site of a folder, kept open so that images and model stay warm between rounds.

    Of more than 64 sites in one process, those asked longest ago are let go, with their memory and open files (one per
    stream), and start from disk when they are asked again.
    """
    return Site(folder, state_dir)
