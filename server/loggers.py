"""Logs rounds to TensorBoard, MLflow or Weights & Biases.

    tensorboard   an events file in the run folder, written anew when a run goes on
    mlflow        a run in `mlflow.db` of the run folder, its files in `mlflow`, or at the server that
                  MLFLOW_TRACKING_URI names
    wandb         a run in the folder `wandb` of the run folder, sent nowhere unless WANDB_MODE is `online`;
                  `wandb sync` sends it later

A resumed run continues its run of MLflow, which is known by the tag `panfm.run-id`, and its run of wandb by its id.
MLflow has no histograms: it is given the mean of the sites' update norms alone.
"""

import io
import os
import shutil
import time
from collections.abc import Mapping
from importlib import import_module
from typing import Any

import numpy as np
from PIL import Image
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.summary import histogram, scalar, text

from panfm.config import dump_toml
from panfm.extras import needs_extra
from panfm.privacy.guarantees import privacy_label
from server.run_folder import RunFolder
from server.tracking import scalars, update_norms
from server.tracking_config import tracking_of

_MLFLOW_TAG = "panfm.run-id"
_RGB = 3
"""Code of the colour space in events of TensorBoard."""


class TensorBoardLogger:
    """Writes scalars of every round, and histograms of the sites' update norms by group, for TensorBoard."""

    def __init__(self, folder: RunFolder, run_id: str) -> None:
        """Write a new events file, first the rounds done so far, so that a resumed run shows every round once."""
        place = folder.path / "tensorboard"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        self._events = EventsWriter(str(place / "events"))
        # Tells a TensorBoard that has read an earlier file of the run to drop its values.
        restart = SessionLog(status=SessionLog.START)
        self._events.write_event(Event(wall_time=time.time(), step=0, session_log=restart))
        if (label := privacy_label(folder.run)) != "none":
            self._write(0, text("privacy", label))
        for line in folder.rounds():
            self._add(line)
        self._events.flush()

    def add(self, line: Mapping[str, Any]) -> None:
        """Add a round that has ended."""
        self._add(line)
        self._events.flush()

    def add_images(self, round_number: int, images: Mapping[str, bytes]) -> None:
        """Add images of the model after a round."""
        for name, png in images.items():
            width, height = _picture(png).size
            image = Summary.Image(width=width, height=height, colorspace=_RGB, encoded_image_string=png)
            self._write(round_number, Summary(value=[Summary.Value(tag=name, image=image)]))

    def close(self) -> None:
        """Close the events file."""
        self._events.close()

    def _add(self, line: Mapping[str, Any]) -> None:
        for name, value in scalars(line):
            self._write(line["round"], scalar(name, value))
        for group, norms in update_norms(line).items():
            self._write(line["round"], histogram(f"update-norms/{group}", np.array(norms), "auto"))

    def _write(self, step: int, summary: Summary) -> None:
        self._events.write_event(Event(wall_time=time.time(), step=step, summary=summary))


class MlflowLogger:
    """Writes numbers of every round to MLflow as metrics, with the round as step, and the description as `run.toml`."""

    def __init__(self, folder: RunFolder, run_id: str) -> None:
        """Begin a run in MLflow, or go on with the run that has the tag."""
        with needs_extra("mlflow"):
            mlflow = import_module("mlflow")
        self._metric = mlflow.entities.Metric
        uri = os.environ.get("MLFLOW_TRACKING_URI")
        here, files = f"sqlite:///{folder.path.resolve()}/mlflow.db", (folder.path.resolve() / "mlflow").as_uri()
        self._client = mlflow.MlflowClient(tracking_uri=uri or here)
        project = tracking_of(folder.run).project
        known = self._client.get_experiment_by_name(project)
        experiment = known.experiment_id if known else self._client.create_experiment(project, None if uri else files)
        begun = self._client.search_runs([experiment], f"tags.`{_MLFLOW_TAG}` = '{run_id}'")
        if begun:
            self._run = begun[0].info.run_id
            return
        tags = {_MLFLOW_TAG: run_id, "panfm.privacy": privacy_label(folder.run)}
        self._run = self._client.create_run(experiment, run_name=folder.path.name, tags=tags).info.run_id
        self._client.log_text(self._run, dump_toml(folder.shared_run), "run.toml")
        for line in folder.rounds():
            self.add(line)

    def add(self, line: Mapping[str, Any]) -> None:
        """Add a round that has ended."""
        now = int(time.time() * 1000)
        metrics = [self._metric(name, value, now, line["round"]) for name, value in scalars(line)]
        self._client.log_batch(self._run, metrics=metrics)

    def add_images(self, round_number: int, images: Mapping[str, bytes]) -> None:
        """Add images of the model after a round, as files of the run."""
        for name, png in images.items():
            path = f"{name}-round-{round_number}.png"
            self._client.log_image(self._run, _picture(png), artifact_file=path)

    def close(self) -> None:
        """Mark the run as ended."""
        self._client.set_terminated(self._run)


class WandbLogger:
    """Writes numbers of every round, and histograms of the sites' update norms by group, to Weights & Biases."""

    def __init__(self, folder: RunFolder, run_id: str) -> None:
        """Begin a run in wandb, or go on with it. It records nothing about the machine, the code or the console."""
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

    def add_images(self, round_number: int, images: Mapping[str, bytes]) -> None:
        """Add images of the model after a round."""
        self._run.log({name: self._wandb.Image(_picture(png)) for name, png in images.items()}, step=round_number)

    def close(self) -> None:
        """End the run."""
        self._run.finish()


def _picture(png: bytes) -> Image.Image:
    return Image.open(io.BytesIO(png))
