"""ServerApp: reads the run config, opens the run folder, runs the federation, or evaluates the model of a run."""

from contextlib import ExitStack
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from panfm.config import site_folders
from panfm.errors import ConfigError
from panfm.files import make_files_private
from panfm.privacy.guarantees import load_checked_run
from server.alerts import alerted, watched_certificates
from server.evaluation import evaluate_run
from server.logged_progress import progress_of_environment
from server.rounds import run_federation
from server.run_folder import RunFolder, default_path, early_end_noted
from server.run_watch import watched
from server.superlink_watch import outages_survived
from server.tracking import refresh_page

_ROOT = Path(__file__).resolve().parents[1]
app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the experiment that the run config names; raises, and so fails the run, if it does not do what was asked."""
    make_files_private()
    words = {key: str(value) for key, value in context.run_config.items()}
    num_sites = len(site_folders(Path(sites))) if (sites := words.get("sites")) else None
    with ExitStack() as stack:
        if words.get("evaluate"):
            evaluate_run(grid, Path(words["run-dir"]), words["evaluate"], num_sites=num_sites)
            return
        with early_end_noted(words.get("resume")):
            folder = open_folder(words)
            stack.callback(refresh_page, folder.path)
            stack.enter_context(alerted(folder.path, folder.run.name, folder.events))
        stack.enter_context(folder.at_work())
        stack.enter_context(watched(folder.path, folder.events, watched_certificates(folder.path)))
        steady = stack.enter_context(outages_survived(grid, folder, is_simulated=num_sites is not None))
        run_federation(steady, folder, progress_of_environment(), num_sites=num_sites)


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
