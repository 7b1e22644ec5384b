"""MLflow: a run in the folder `mlflow` of the run folder, or at the server that MLFLOW_TRACKING_URI names.

A run that is resumed goes on in the run of MLflow that it began, which is known by the tag `panfm.run-id`.
"""

import os
import time
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from panfm.config import dump_toml
from panfm.errors import needs_extra
from panfm.privacy.guarantees import privacy_label
from server.run_folder import RunFolder
from server.tracking import scalars
from server.tracking_config import tracking_of

_TAG = "panfm.run-id"


class MlflowLogger:
    """Numbers of every round as metrics whose step is the round, and the description as `run.toml`."""

    def __init__(self, folder: RunFolder, run_id: str) -> None:
        """Begin a run of MLflow, or go on with it."""
        with needs_extra("mlflow"):
            mlflow = import_module("mlflow")
        self._metric = mlflow.entities.Metric
        uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{folder.path.resolve()}/mlflow.db"
        self._client = mlflow.MlflowClient(tracking_uri=uri)
        project = tracking_of(folder.run).project
        known = self._client.get_experiment_by_name(project)
        experiment = known.experiment_id if known else self._client.create_experiment(project)
        begun = self._client.search_runs([experiment], f"tags.`{_TAG}` = '{run_id}'")
        if begun:
            self._run = begun[0].info.run_id
            return
        tags = {_TAG: run_id, "panfm.privacy": privacy_label(folder.run)}
        self._run = self._client.create_run(experiment, run_name=folder.path.name, tags=tags).info.run_id
        self._client.log_text(self._run, dump_toml(folder.shared_run), "run.toml")
        for line in folder.rounds():
            self.add(line)

    def add(self, line: Mapping[str, Any]) -> None:
        """Add a round that has ended."""
        now = int(time.time() * 1000)
        metrics = [self._metric(name, value, now, line["round"]) for name, value in scalars(line)]
        self._client.log_batch(self._run, metrics=metrics)

    def close(self) -> None:
        """Mark the run as ended."""
        self._client.set_terminated(self._run)
