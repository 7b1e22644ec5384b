"""A simulated site, in this process: the same answers as the worker's, from the partition's folder (run config)."""

from functools import lru_cache
from pathlib import Path

from flwr.app import Context

from panfm.config import site_folders
from panfm.errors import PanfmError
from panfm.sharing.frames import Frame
from panfm.site import answer, resident_site
from panfm.site.scrub import scrub


def ask(context: Context, question: Frame) -> Frame:
    """What the site answers."""
    sites, run_dir = str(context.run_config["sites"]), str(context.run_config.get("run-dir", ""))
    try:
        home = _homes(sites, _changed(sites))[int(context.node_config["partition-id"])]
        site = resident_site(home, Path(run_dir, "sites", home.name) if run_dir else None)
    except PanfmError as error:
        return Frame.error(scrub(error))
    return answer(site, question)


@lru_cache(maxsize=1)
def _homes(sites: str, _: int) -> list[Path]:
    """The site folders, looked up once: at 1,000 sites, a look takes longer than a small site's step."""
    return site_folders(Path(sites))


def _changed(sites: str) -> int:
    """When a folder came or went, in ns."""
    return Path(sites).stat().st_mtime_ns if Path(sites).is_dir() else 0
