"""The job without a framework: train every site in turn, then take the mean."""

import sys

import torch

from simulations.bench.peer_jobs.peer_training import State, job_at


def main(path: str) -> None:
    """Run all rounds."""
    job = job_at(path)
    state = job.start()
    for round_number in range(1, job.rounds + 1):
        total: State = {name: torch.zeros_like(value) for name, value in state.items()}
        for site in range(len(job.folders)):
            for name, value in job.train(site, round_number, state).items():
                total[name] += value
        state = {name: value / len(job.folders) for name, value in total.items()}
    job.keep(state)


if __name__ == "__main__":
    main(sys.argv[1])
