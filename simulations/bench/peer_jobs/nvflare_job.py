"""The job in NVFlare: its FedAvg recipe in its simulator, one process for each of eight clients."""

import sys
import tempfile
from pathlib import Path

import torch
from nvflare.app_opt.pt.recipes.fedavg import FedAvgRecipe
from nvflare.recipe.sim_env import SimEnv
from torch import nn

from simulations.bench.peer_jobs import nvflare_client
from simulations.bench.peer_jobs.peer_training import job_at


class StartModel(nn.Module):
    """The model that the first round starts from."""

    def __init__(self, job: str) -> None:
        super().__init__()
        self.model = job_at(job).trainer.model


def main(path: str) -> None:
    """Run all rounds."""
    job = job_at(path)
    name, num_sites = f"{StartModel.__module__}.{StartModel.__name__}", len(job.folders)
    if StartModel.__module__ == "__main__":
        name = f"simulations.bench.peer_jobs.nvflare_job.{StartModel.__name__}"
    with tempfile.TemporaryDirectory(dir=job.model_file.parent) as folder:
        recipe = FedAvgRecipe(
            name="peer",
            model={"class_path": name, "args": {"job": path}},
            min_clients=num_sites,
            num_rounds=job.rounds,
            train_script=str(Path(nvflare_client.__file__)),
            train_args=path,
            server_expected_format="pytorch",
        )
        recipe.execute(SimEnv(num_clients=num_sites, num_threads=num_sites, workspace_root=folder))
        (kept,) = Path(folder).rglob("FL_global_model.pt")
        state = torch.load(kept, weights_only=False)["model"]
    job.keep({key.removeprefix("model."): torch.as_tensor(value) for key, value in state.items()})


if __name__ == "__main__":
    main(sys.argv[1])
