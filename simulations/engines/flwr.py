"""Flower's command line for engines, with a home of their own and a look at the rounds meanwhile."""

from collections.abc import Mapping
from pathlib import Path

from server.console import Lines, follow
from server.flower_cli import ROOT, FlowerRun, flower_environment, flwr, submit
from simulations.engines.job import Job
from simulations.engines.offline import OFFLINE

__all__ = ["ROOT", "flwr", "private_environment", "submit", "wait_for_end"]


def private_environment(home: Path) -> dict[str, str]:
    """Environment for `flwr`: offline, with its files under `home`, and this interpreter's commands first."""
    return flower_environment() | OFFLINE | {"FLWR_HOME": str(home)}


def wait_for_end(run_id: str, connection: str, job: Job, environment: Mapping[str, str]) -> None:
    """Show rounds as they end, until Flower says that the run has ended. Raises RunError if it failed."""
    follow(job.run_dir, Lines(), FlowerRun(run_id, connection), environment)
