"""Weights & Biases: a run in the folder `wandb` of the run folder, sent nowhere unless WANDB_MODE is `online`.

`wandb sync` sends it later. A run that is resumed has the same id.
"""

import os
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from panfm.errors import needs_extra
from panfm.privacy.guarantees import privacy_label
from server.run_folder import RunFolder
from server.tracking import scalars, update_norms
from server.tracking_config import tracking_of


class WandbLogger:
    """Numbers of every round at the step of the round, and histograms of the sites' update norms by group."""

    def __init__(self, folder: RunFolder, run_id: str) -> None:
        """Begin a run, or go on with it. Nothing of the machine, of the code or of the console goes into it."""
        with needs_extra("wandb"):
            self._wandb = import_module("wandb")
        run = folder.shared_run.model_dump(mode="json", by_alias=True, exclude_none=True)
        self._run = self._wandb.init(
            project=tracking_of(folder.run).project,
            id=run_id,
            name=folder.path.name,
            dir=str(folder.path),
            mode=os.environ.get("WANDB_MODE", "offline"),
            resume="allow",
            config=run | {"privacy": privacy_label(folder.run)},
            settings=self._wandb.Settings(
                console="off", disable_code=True, disable_git=True, x_disable_meta=True, x_disable_stats=True
            ),
        )
        for line in folder.rounds():
            self.add(line)

    def add(self, line: Mapping[str, Any]) -> None:
        """Add a round that has ended."""
        norms = {f"update-norms/{group}": self._wandb.Histogram(norms) for group, norms in update_norms(line).items()}
        self._run.log(dict(scalars(line)) | norms, step=line["round"])

    def close(self) -> None:
        """End the run."""
        self._run.finish()
