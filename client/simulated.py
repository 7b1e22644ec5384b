"""Answers in this process for a simulated site, whose folder the run config names, in place of a worker."""

from functools import lru_cache
from pathlib import Path

from flwr.app import Context

from panfm.config import site_folders
from panfm.errors import PanfmError
from panfm.sharing.frames import Frame
from panfm.site import answer, resident_site
from panfm.site.handler import scrub


def ask(context: Context, question: Frame) -> Frame:
    """Answer a question as the worker of the partition's site would."""
    sites, run_dir = str(context.run_config["sites"]), str(context.run_config.get("run-dir", ""))
    try:
        folder = _site_folders(sites, _changed(sites))[int(context.node_config["partition-id"])]
        site = resident_site(folder, Path(run_dir, "sites", folder.name) if run_dir else None)
    except PanfmError as error:
        return Frame.error(scrub(error))
    return answer(site, question)


@lru_cache(maxsize=1)
def _site_folders(sites: str, _: int) -> list[Path]:
    """The site folders, listed once: at 1,000 sites, listing takes longer than a small site's step."""
    return site_folders(Path(sites))


def _changed(sites: str) -> int:
    """Time of the last change of the list of folders, in ns."""
    return Path(sites).stat().st_mtime_ns if Path(sites).is_dir() else 0
