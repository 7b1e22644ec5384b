"""A simulated site, in this process: the same answers as the worker's, from the partition's folder (run config)."""

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
        home = site_folders(Path(sites))[int(context.node_config["partition-id"])]
        site = resident_site(home, Path(run_dir, "sites", home.name) if run_dir else None)
    except PanfmError as error:
        return Frame.error(scrub(error))
    return answer(site, question)
