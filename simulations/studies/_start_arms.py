"""Arms of the study of real pictures with a public start: a ViT-S/14 in DINOv2's layout that $PANFM_WEIGHTS names.

    start              the frozen model
    adapted            the start after 3 rounds of 10 steps of `views` on its last two blocks
    adapted-attention  the same on the output projections of attention in its last four blocks
    adapted-private    the start after 2 rounds of 5 private steps of `view-regression` (epsilon 8 for each patient) on
                       low-rank additions to the attention of its last two blocks

Each model is read in two ways: `<arm>` by the last block, CLS and the mean of the tokens; `<arm>-readout` by blocks 8,
10 and 12, CLS, mean and deviation, with within-image whitening. The whitening is fitted for each stream on the training
pictures of its site, without their labels. Pictures have 84 x 84 pixels: 6 x 6 tokens.

The first two adaptations are gated (`_round_gate.py`) by the leave-one-out error of probes on the sites' training
pictures, read as `-readout`. Errors leave a site without noise: the private arm has no gate.

    adapted-heldout            the same as if no site had ultrasound; what it shows there is reported with `adapted`
    adapted-attention-heldout  likewise, reported with `adapted-attention`
"""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np
import typer
from numpy.typing import NDArray
from rich.console import Console

from panfm.config import RunConfig
from panfm.config.features import FeaturesConfig
from panfm.data.store import ImageStore
from panfm.errors import ConfigError
from panfm.evaluate.embed import embed_store
from panfm.evaluate.fit_whitening import fit_whitening
from panfm.models import PanModel, build_model
from panfm.models.warm_start import start_model
from simulations.cohorts.opened import OpenedCohort
from simulations.cohorts.prepare import WEIGHTS, cohort_of, load_simulation, public_weights
from simulations.harness import QUICKSTART
from simulations.studies._class_probe import leave_one_out_error
from simulations.studies._cohorts import write_files
from simulations.studies._federations import federate_on_copies, federated
from simulations.studies._frozen_prefix import Memory, remember_prefix
from simulations.studies._round_gate import KeptRound, kept_round

EXPERIMENT = QUICKSTART.with_name("real-pictures.toml")
READINGS = {
    "": FeaturesConfig(pooling="cls+mean"),
    "-readout": FeaturesConfig(pooling="layers", layers=(8, 10, 12), whitening=True, whitening_lambda=1.0),
}
"""Suffix of an arm's name -> pooling and whitening of its features."""
FROZEN_BLOCKS = 8
"""First blocks, which no arm trains."""
PRIVATE = "adapted-private"
ADAPTATIONS: Mapping[str, Sequence[str]] = {
    "adapted": (),
    "adapted-attention": ('train.parts={ kind = "attention-projections", blocks = 4 }', "train.learning-rate=1e-3"),
    PRIVATE: (
        'train.parts={ kind = "lora", rank = 8, blocks = 2, frozen-a = true }',
        "train.learning-rate=1e-3",
        "train.rounds=2",
        "train.local-steps=5",
        "train.teacher-momentum=[1.0, 1.0]",
        'objective={ name = "view-regression", hidden-width = 32 }',
        'features={ pooling = "cls+mean" }',
        "patient-dp={ epsilon = 8.0, delta = 5e-4, public-subjects = 150, sample-rate = 0.1, noise-multiplier = 0.51 }",
    ),
}
"""Arm -> what it changes in the experiment as that is with weights (`cohort.with-weights`). The private noise is what
10 steps need (`panfm ledger plan`)."""
ARMS = ("start", *ADAPTATIONS)
HELD_OUT_ARMS = {f"{arm}-heldout": arm for arm in ("adapted", "adapted-attention")}
"""Arm that is trained without a stream -> the arm that it is reported with."""
HELD_OUT = "breast-ultrasound"
"""The stream that no site trains on then: the one whose AUC is farthest from 1."""


def require_weights() -> None:
    """Raises ConfigError if the environment names no weights."""
    if not public_weights():
        raise ConfigError(f"{WEIGHTS}: missing, expected a file of public weights in it")


def possible_arms(arms: Sequence[str], without_weights: Collection[str]) -> list[str]:
    """Leave out the arms (variants of the study) that start from public weights if the environment names no weights.

    A line on the console names the arms that are left out.

    Args:
        without_weights: Arms that need no weights.
    Raises:
        typer.BadParameter: no arm is left.
    """
    left = [arm for arm in arms if arm in without_weights or public_weights()]
    if not left:
        raise typer.BadParameter(f"{', '.join(arms)}: need {WEIGHTS}, expected a file of weights in it")
    if dropped := [arm for arm in arms if arm not in left]:
        Console(stderr=True, soft_wrap=True).print(f"{WEIGHTS} is not set: left out {', '.join(dropped)}")
    return left


def start_run(seed: int, arm: str = "start", more: Sequence[str] = ()) -> RunConfig:
    """The run of one arm. Raises ConfigError: the weights cannot be read.

    Args:
        more: Changes beyond those of the arm.
    """
    changes = [*ADAPTATIONS.get(HELD_OUT_ARMS.get(arm, arm), ()), f"seed={seed}", *more]
    return load_simulation(EXPERIMENT, changes, weights=public_weights())


def write_without(folder: Path, run: RunConfig, stream: str) -> Path:
    """Write the sites of a run as if none had pictures of a stream, into a folder of the cohort's; returns it."""
    cohort = cohort_of(run).table()
    sites = {name: [other for other in site["streams"] if other != stream] for name, site in cohort["sites"].items()}
    left = {name: {"streams": streams} for name, streams in sites.items() if streams}
    without = type(cohort_of(run)).model_validate(cohort | {"sites": left, "held-out": [stream]})
    return write_files(without, folder_without(folder, stream), run)


def folder_without(folder: Path, stream: str) -> Path:
    """Where the sites of a cohort's folder lie as they are without a stream."""
    return folder / f"without-{stream}"


def adapt(arm: str, run: RunConfig, folder: Path, memory: Memory) -> KeptRound:
    """The frozen start, or the model that the sites of a cohort's folder have adapted."""
    if arm == "start":
        return KeptRound(0, float("nan"), start_model(run))
    if arm == PRIVATE:
        return KeptRound(run.train.rounds, float("nan"), federate_on_copies(run, folder).model)
    cohort = OpenedCohort.open(folder, run)

    def error(model: PanModel) -> float:
        return leave_one_out_error(StreamReader(model, run, READINGS["-readout"], cohort, memory), cohort)

    with federated(run, folder) as done:
        return kept_round(done, error)


class StreamReader:
    """Reads features of one stream after the other, whitened apart."""

    def __init__(
        self,
        model: PanModel,
        run: RunConfig,
        features: FeaturesConfig,
        cohort: OpenedCohort,
        memory: Memory | None = None,
    ) -> None:
        """Args:
        memory: Of the outputs of the blocks that no arm trains; none for models with experts.
        """
        self._model = model
        self._run = run.model_copy(update={"features": features})
        self._cohort = cohort
        self._memory = memory
        self._of_stream: dict[str, PanModel] = {}

    def __call__(self, store: ImageStore, stream: str, indices: NDArray[np.int64]) -> NDArray[np.floating]:
        """Features [n, D] of one stream of the subjects at some indices of a store."""
        if stream not in self._of_stream:
            holders = {site: store for site, store in self._cohort.stores.items() if stream in store.images}
            self._of_stream = {stream: self._part(stream, holders)}
        return embed_store(self._of_stream[stream], store, indices, [stream])

    def _part(self, stream: str, stores: Mapping[str, ImageStore]) -> PanModel:
        """The part of the model that encodes one stream, with a whitening if the run's features have one."""
        part, state = build_model(self._run, [stream]), self._model.state_dict()
        part.load_state_dict({name: state[name] for name in part.state_dict()})
        if self._memory is not None:
            remember_prefix(part, FROZEN_BLOCKS, self._memory)
        if self._run.features.whitening:
            part.whitening = fit_whitening(part, stores, self._run.features, self._run.seed)
        return part
