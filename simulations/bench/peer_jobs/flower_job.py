"""The job in plain Flower: FedAvg and a ClientApp as in its examples, through its simulation engine."""

import logging
import sys

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation

from simulations.bench.peer_jobs.peer_training import job_at


def main(path: str) -> None:
    """Run all rounds."""
    job = job_at(path)
    num_sites = len(job.folders)
    client_app, server_app = ClientApp(), ServerApp()

    @client_app.train()
    def train(message: Message, context: Context) -> Message:
        site = int(context.node_config["partition-id"])
        round_number = message.content.config_records["config"]["server-round"]
        assert isinstance(round_number, int)
        state = message.content.array_records["arrays"].to_torch_state_dict()
        trained = job_at(path).train(site, round_number, state)
        content = RecordDict({"arrays": ArrayRecord(trained), "metrics": MetricRecord({"num-examples": 1})})
        return Message(content, reply_to=message)

    @server_app.main()
    def serve(grid: Grid, _: Context) -> None:
        strategy = FedAvg(fraction_evaluate=0.0, min_train_nodes=num_sites, min_available_nodes=num_sites)
        result = strategy.start(grid, ArrayRecord(job.start()), num_rounds=job.rounds)
        job.keep(result.arrays.to_torch_state_dict())

    logging.getLogger("flwr").setLevel(logging.ERROR)
    resources = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}, "init_args": {"log_to_driver": False}}
    run_simulation(server_app, client_app, num_supernodes=num_sites, backend_config=resources)  # type: ignore[arg-type]


if __name__ == "__main__":
    main(sys.argv[1])
