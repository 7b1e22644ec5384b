"""ServerApp: reads the run config, opens the run folder, runs the federation."""

from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from panfm.config import site_folders
from panfm.errors import ConfigError
from panfm.files import make_files_private
from panfm.privacy.guarantees import load_checked_run
from server.alerts import alerted, watched_certificates
from server.json_log import progress_of_environment
from server.rounds import run_federation
from server.run_folder import RunFolder, default_path
from server.run_watch import watched
from server.superlink_watch import outages_survived
from server.tracking import refresh_page

_ROOT = Path(__file__).resolve().parents[1]

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the experiment that the run config names; raises, and so fails the run, if it does not do what was asked."""
    make_files_private()
    progress = progress_of_environment()
    words = {key: str(value) for key, value in context.run_config.items()}
    sites = words.get("sites", "")
    num_sites = len(site_folders(Path(sites))) if sites else None
    folder = open_folder(words)
    try:
        with (
            alerted(folder.path, folder.run.name, folder.events),
            folder.at_work(),
            watched(folder.path, folder.events, watched_certificates(folder.path)),
            outages_survived(grid, folder, is_simulated=num_sites is not None) as steady,
        ):
            run_federation(steady, folder, progress, num_sites=num_sites)
    finally:
        refresh_page(folder.path)


def open_folder(words: dict[str, str]) -> RunFolder:
    """The run folder to fill: a new one for `experiment`, or the one that `resume` names.

    Raises:
        ConfigError: the experiment or its overrides do not hold.
        RunError: the folder holds a run already.
    """
    if resume := words.get("resume"):
        return RunFolder.resume(Path(resume))
    if not (experiment := words.get("experiment")):
        raise ConfigError("run-config: experiment is missing, expected the path of a run description")
    overrides = [override for override in words.get("overrides", "").split(";") if override.strip()]
    run = load_checked_run(_ROOT / experiment, overrides)
    return RunFolder.create(Path(words["run-dir"]) if words.get("run-dir") else default_path(run.name), run)
