"""Four ways to run the same ServerApp, ClientApp and strategy on one machine, bit for bit the same."""

from simulations.engines.job import ENGINES, Job, run_job

__all__ = ["ENGINES", "Job", "run_job"]
