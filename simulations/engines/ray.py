"""Engine `ray`: Flower's simulation engine, sites in parallel processes.

Flower's Python entry takes no run config, so both apps are wrapped to see it.
"""

import logging
from dataclasses import dataclass

from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.simulation import run_simulation

from simulations.engines.job import Job
from simulations.engines.logs import logged_to
from simulations.engines.resources import site_resources


@dataclass
class _ConfiguredClient(ClientApp):
    """The ClientApp, in a context with our run config, its log in the run folder."""

    job: Job

    def __call__(self, message: Message, context: Context) -> Message:
        from client.app import app

        with logged_to(self.job.log):
            return app(message, _with_config(context, self.job.run_config()))


def run(job: Job) -> None:
    """Run a federation on Ray, one CPU per site at work and, where there are GPUs, a share of one."""
    from server.app import app

    server_app = ServerApp()

    @server_app.main()
    def main(grid: Grid, context: Context) -> None:
        app(grid, _with_config(context, job.run_config()))

    logging.getLogger("flwr").setLevel(logging.ERROR)
    with logged_to(job.log):
        run_simulation(
            server_app,
            _ConfiguredClient(job),
            num_supernodes=job.num_sites,
            backend_config={
                "client_resources": {**site_resources(job)},
                "init_args": {"log_to_driver": False},
            },
        )


def _with_config(context: Context, run_config: dict[str, str]) -> Context:
    return Context(context.run_id, context.node_id, context.node_config, context.state, dict(run_config))
