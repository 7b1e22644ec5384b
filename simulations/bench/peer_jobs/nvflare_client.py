"""What each NVFlare client runs: receive the model, train a round, send the model."""

import sys

import nvflare.client as flare
import torch

from simulations.bench.peer_jobs.peer_training import job_at

_PREFIX = "model."


def main(path: str) -> None:
    """Answer until the job is over."""
    flare.init()
    site = int(flare.get_site_name().rpartition("-")[2]) - 1
    while flare.is_running():
        received = flare.receive()
        if received is None:
            break
        state = {name.removeprefix(_PREFIX): torch.as_tensor(value) for name, value in received.params.items()}
        trained = job_at(path).train(site, received.current_round + 1, state)
        params = {f"{_PREFIX}{name}": value for name, value in trained.items()}
        flare.send(flare.FLModel(params=params, meta={"NUM_STEPS_CURRENT_ROUND": 1}))


if __name__ == "__main__":
    main(sys.argv[1])
