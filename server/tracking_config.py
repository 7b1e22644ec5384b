"""`[tracking]` of a run description: where the rounds are logged. No site is told of it."""

from importlib.util import find_spec
from typing import Annotated

from pydantic import Field

from panfm.config import RunConfig, parse_table
from panfm.config.base import Config, Name, plug_in
from panfm.errors import ConfigError
from panfm.registry import Registry

LOGGERS = Registry(
    "tracking.loggers",
    {
        "tensorboard": "server.loggers:TensorBoardLogger",
        "mlflow": "server.loggers:MlflowLogger",
        "wandb": "server.loggers:WandbLogger",
    },
)
"""Loggers of rounds (`server.tracking.RoundLogger`)."""
_LIBRARIES = ("mlflow", "wandb")
"""Of the extras of the same name."""


class TrackingConfig(Config):
    """Loggers of a run's rounds."""

    loggers: Annotated[tuple[Annotated[str, plug_in(LOGGERS)], ...], Field(strict=False)] = ("tensorboard",)
    """tensorboard: events in the run folder; mlflow: a run in `mlflow.db`, or where MLFLOW_TRACKING_URI says;
    wandb: a run in the folder `wandb`, sent nowhere unless WANDB_MODE is `online`."""
    project: Name = "panfm"
    """Experiment of MLflow, project of Weights & Biases."""
    images: bool = False
    """Whether a simulation with a hold-out gives the loggers the report's example slices: a held-out image of each
    stream, the same with hidden patches, and the prediction. A run of real sites has no images to give."""


def tracking_of(run: RunConfig) -> TrackingConfig:
    """The table of a run, or its defaults.

    Raises:
        ConfigError: it does not hold, or names a logger whose library is not installed.
    """
    if run.tracking is None:
        return TrackingConfig()
    tracking = parse_table(TrackingConfig, run.tracking, run.name, key="tracking")
    for library in _LIBRARIES:
        if library in tracking.loggers and find_spec(library) is None:
            raise ConfigError(f"tracking.loggers: {library} is not installed, expected: pip install 'panfm[{library}]'")
    return tracking
