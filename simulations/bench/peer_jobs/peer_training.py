"""Training of one site that all frameworks of the bench `peers` share: the same model, images, steps and seeds.

Imports the library's base alone, so that it runs in an environment of any framework.
"""

import json
from collections.abc import Mapping
from functools import cached_property, lru_cache
from pathlib import Path

import torch
from torch import Tensor

from panfm.config import load_run, site_folders
from panfm.data.cache import open_store
from panfm.data.store import ImageStore
from panfm.training.trainer import Trainer
from panfm.training.training_state import build_optimiser

State = dict[str, Tensor]


class PeerJob:
    """A federated job: a run description, site folders, and the file that the last global model goes to."""

    def __init__(self, path: Path) -> None:
        table = json.loads(path.read_text(encoding="utf-8"))
        self.run = load_run(Path(table["run"]))
        self.folders = site_folders(Path(table["sites"]))
        self.model_file = Path(table["model"])
        torch.set_num_threads(self.run.train.threads)

    @property
    def rounds(self) -> int:
        """Rounds of the job."""
        return self.run.train.rounds

    @cached_property
    def trainer(self) -> Trainer:
        """The one model of this process; sites take turns at it."""
        return Trainer(self.run)

    @cached_property
    def stores(self) -> list[ImageStore]:
        """Images of every site."""
        return [open_store(folder, self.run.streams) for folder in self.folders]

    def start(self) -> State:
        """The model that the first round starts from."""
        return Trainer(self.run).shared_state()

    def train(self, site: int, round_number: int, state: Mapping[str, Tensor]) -> State:
        """Train a site for a round, from round 1; its shared parameters afterwards."""
        self.trainer.load_shared(state)
        self._train(site, round_number)
        return self.trainer.shared_state()

    def train_in_place(self, site: int, round_number: int) -> None:
        """Train a site for a round, from the parameters that the model has, with a new optimiser."""
        self.trainer.optimiser = build_optimiser(self.trainer.model, self.run.train)
        self._train(site, round_number)

    def _train(self, site: int, round_number: int) -> None:
        store, num_steps = self.stores[site], self.run.train.local_steps
        self.trainer.train(
            store,
            store.indices("train"),
            first_step=(round_number - 1) * num_steps,
            num_steps=num_steps,
            site=self.folders[site].name,
            round_number=round_number,
        )

    def keep(self, state: Mapping[str, Tensor]) -> None:
        """Write the last global model."""
        torch.save({name: value.detach().cpu().float() for name, value in state.items()}, self.model_file)


@lru_cache(maxsize=1)
def job_at(path: str) -> PeerJob:
    """The job of this process, opened once."""
    return PeerJob(Path(path))
