"""The job in pfl-research: its FederatedAveraging and its simulated backend; local steps are ours."""

import sys

import numpy as np
import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.hyperparam import NNTrainHyperParams
from pfl.metrics import Metrics
from pfl.model.pytorch import PyTorchModel

from simulations.bench.peer_jobs.peer_training import PeerJob, job_at


class SharedTraining(FederatedAveraging):  # type: ignore[misc]
    """FederatedAveraging whose local training is that of all frameworks."""

    def __init__(self, job: PeerJob) -> None:
        super().__init__()
        self._job = job

    def train_one_user(self, initial_model_state, model, user_dataset, central_context):  # type: ignore[no-untyped-def]
        """Train one site."""
        self._job.train_in_place(int(user_dataset.user_id), central_context.current_central_iteration + 1)
        return model.get_model_difference(initial_model_state), Metrics()


def main(path: str) -> None:
    """Run all rounds."""
    job = job_at(path)
    num_sites, module = len(job.folders), job.trainer.model
    job.trainer.load_shared(job.start())
    module.loss = module.metrics = lambda *_: {}  # type: ignore[assignment]  # asked for, not used
    model = PyTorchModel(module, torch.optim.SGD, torch.optim.SGD(module.parameters(), lr=1.0))
    order = iter([*range(num_sites)] * (job.rounds + 1))
    data = FederatedDataset(lambda site: Dataset([np.zeros(1)], user_id=str(site)), lambda: next(order))
    rounds = NNAlgorithmParams(job.rounds, job.rounds + 1, num_sites, None)
    SharedTraining(job).run(
        rounds, SimulatedBackend(data, data), model, NNTrainHyperParams(1, 0.1, None), send_metrics_to_platform=False
    )
    job.keep(job.trainer.shared_state())


if __name__ == "__main__":
    main(sys.argv[1])
