"""The job that an engine is given, and the choice of an engine."""

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from panfm.config import site_folders
from server.flower_cli import as_one_word

ENGINES = ("local", "ray", "flower", "deployment")
"""local: in this process; ray: Flower's simulation engine; flower: `flwr run` on a local Flower connection; deployment:
the servers of a real one, with TLS and authentication."""


@dataclass(frozen=True)
class Job:
    """One federation over site folders."""

    sites: Path
    """Folder of site folders."""
    run_dir: Path
    """Run folder; holds `run.toml` already. A run that has begun goes on."""
    evaluate: tuple[str, ...] = ()
    """Columns of labels on which the sites evaluate the model of the run, which has finished."""

    @property
    def num_sites(self) -> int:
        """Number of sites."""
        return len(site_folders(self.sites))

    @property
    def log(self) -> Path:
        """File in which sites and server log errors in full."""
        return self.run_dir / "run.log"

    def run_config(self) -> dict[str, str]:
        """The scalars that the apps read."""
        run_dir = str(self.run_dir.resolve())
        words = {"sites": str(self.sites.resolve()), "run-dir": run_dir, "resume": run_dir}
        return words | {"evaluate": as_one_word(self.evaluate)}


def run_job(job: Job, engine: str) -> None:
    """Run a federation to its end. Raises RunError, or what the ServerApp raised, if it did not get there."""
    import_module(f"simulations.engines.{engine}").run(job)
