"""The job in FedLab: its synchronous server and serial clients in one process; local steps are ours."""

import sys
from copy import deepcopy

from fedlab.contrib.algorithm.basic_server import SyncServerHandler
from fedlab.core.client.trainer import SerialClientTrainer
from fedlab.core.standalone import StandalonePipeline

from simulations.bench.peer_jobs.peer_training import PeerJob, job_at


class SharedTraining(SerialClientTrainer):  # type: ignore[misc]
    """Serial clients whose local training is that of all frameworks."""

    def __init__(self, job: PeerJob) -> None:
        super().__init__(job.trainer.model, len(job.folders))
        self._model = job.trainer.model
        self._job = job
        self._round = 0
        self._cache: list[object] = []

    @property
    def uplink_package(self):  # type: ignore[no-untyped-def]
        """The sites' parameters, as FedLab's own clients hand them over."""
        package, self._cache = deepcopy(self._cache), []
        return package

    def local_process(self, payload, id_list):  # type: ignore[no-untyped-def]
        """Train some sites for a round."""
        self._round += 1
        for site in id_list:
            self.set_model(payload[0])
            self._job.train_in_place(site, self._round)
            self._cache.append([self.model_parameters])


class Pipeline(StandalonePipeline):  # type: ignore[misc]
    """FedLab's loop without evaluation."""

    def evaluate(self) -> None:
        """Do nothing."""


def main(path: str) -> None:
    """Run all rounds."""
    job = job_at(path)
    job.trainer.load_shared(job.start())
    handler = SyncServerHandler(job.trainer.model, job.rounds, 1.0)
    Pipeline(handler, SharedTraining(job)).main()
    job.trainer.model.load_state_dict(handler.model.state_dict())
    job.keep(job.trainer.shared_state())


if __name__ == "__main__":
    main(sys.argv[1])
