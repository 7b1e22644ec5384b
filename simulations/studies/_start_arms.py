"""Arms of the study of real pictures with a public start: a ViT-S/14 in DINOv2's layout that $PANFM_WEIGHTS names.

    start            the frozen model, last block: CLS and the mean of the tokens
    start-readout    the same model, blocks 8, 10 and 12: CLS, mean and deviation, with within-image whitening
    adapted          the start after 3 rounds of 10 steps of `views` on its last two blocks, read as `start`
    adapted-readout  the same model, read as `start-readout`

Pictures have 84 x 84 pixels: 6 x 6 tokens. No round is refused for a worse validation measure: the adapted arms are not
gated. The whitening is fitted for each stream on the training pictures of its site, without their labels.
"""

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from panfm.anatomy import module_name
from panfm.config import RunConfig
from panfm.config.features import FeaturesConfig
from panfm.data.store import ImageStore
from panfm.evaluate.embed import embed_store
from panfm.evaluate.fit_whitening import fit_whitening
from panfm.models import PanModel, build_model
from panfm.models.warm_start import start_model
from simulations.cohorts.opened import OpenedCohort
from simulations.cohorts.prepare import load_simulation
from simulations.studies._federations import federate

ENVIRONMENT = "PANFM_WEIGHTS"
ARMS = ("start", "adapted")
"""Models; each is read in two ways."""
READINGS = {
    "": FeaturesConfig(pooling="cls+mean"),
    "-readout": FeaturesConfig(pooling="layers", layers=(8, 10, 12), whitening=True, whitening_lambda=1.0),
}
"""Suffix of an arm's name -> pooling and whitening of its features."""
STREAM_CHANGES = ("shape=[84, 84]", "patch=[14, 14]")
"""Of every stream."""
CHANGES = (
    'model={ size = "small", tokenizer = "patch", positions = "learned", layer-scale = true }',
    'train.parts={ kind = "last-blocks", blocks = 2 }',
    "train.rounds=3",
    "train.local-steps=10",
    "train.batch-size=16",
    "train.learning-rate=1e-4",
    "masking.ratio=0.6",
    'sharing.head="private"',
)
"""What the adaptation changes in the experiment, as `--set` would."""


def weights() -> str | None:
    """Path of the public weights; None if the environment names none."""
    return os.environ.get(ENVIRONMENT) or None


def start_run(experiment: Path, seed: int) -> RunConfig:
    """The run that adapts the public start. Raises ConfigError: the weights cannot be read."""
    streams = load_simulation(experiment).streams
    of_streams = [f"streams.{module_name(stream)}.{change}" for stream in streams for change in STREAM_CHANGES]
    return load_simulation(experiment, [*of_streams, *CHANGES, f"seed={seed}", f"start.model={weights()}"])


def model_of(arm: str, run: RunConfig, folder: Path) -> PanModel:
    """The frozen start, or the model that the sites of a cohort's folder have adapted."""
    return start_model(run) if arm == "start" else federate(run, folder).model


class StreamReader:
    """Reads features of one stream after the other, whitened apart."""

    def __init__(self, model: PanModel, run: RunConfig, features: FeaturesConfig, cohort: OpenedCohort) -> None:
        self._model = model
        self._run = run.model_copy(update={"features": features})
        self._cohort = cohort
        self._of_stream: dict[str, PanModel] = {}

    def __call__(self, store: ImageStore, stream: str, indices: NDArray[np.int64]) -> NDArray[np.floating]:
        """Features [n, D] of one stream of the subjects at some indices of a store."""
        if stream not in self._of_stream:
            holders = {site: store for site, store in self._cohort.stores.items() if stream in store.images}
            self._of_stream = {stream: _of_stream(self._model, self._run, stream, holders)}
        return embed_store(self._of_stream[stream], store, indices, [stream])


def _of_stream(model: PanModel, run: RunConfig, stream: str, stores: Mapping[str, ImageStore]) -> PanModel:
    """The part of a model that encodes one stream, with a whitening if the run's features have one."""
    part, state = build_model(run, [stream]), model.state_dict()
    part.load_state_dict({name: state[name] for name in part.state_dict()})
    if run.features.whitening:
        part.whitening = fit_whitening(part, stores, run.features, run.seed)
    return part
