"""Parts that the studies of Director-Experts share: ten-modality pictures, frozen probes, a modality that joins.

Every picture shows one of six shapes in one of ten modalities. Nine stand at the sites; the last, which nobody has, is
for transfer: its tokenizer is trained for a few steps on a frozen backbone, then its shapes are probed.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from torch import Tensor

from panfm.config import RunConfig
from panfm.evaluate.embed import embed_store
from panfm.evaluate.probe_labels import LabelledStore
from panfm.evaluate.representation import modality_cka
from panfm.models import PanModel
from panfm.models.backbone import Route
from panfm.sharing.groups import stream_of
from panfm.training.trainer import Trainer
from simulations.alone import train_round
from simulations.cohorts.opened import OpenedCohort
from simulations.cohorts.prepare import cohort_of, load_simulation
from simulations.harness import TRANSIENT, CohortJob
from simulations.studies._cohorts import FrozenReader, resized, write_files
from simulations.studies._modality_probe import Classed, leave_one_modality_out, probe_classes, probe_each_modality
from simulations.studies._routing import seed_routing
from simulations.studies._tables import mean_sd, print_study
from simulations.study_result import StudyResult

EXPERIMENT = TRANSIENT.with_name("dex-ten-modalities.toml")
"""The run that these studies start from."""
DENSE_MULTIPLE = 4
"""Hidden width of a dense MLP over the model's; experts get this over the number that is active, so that a picture
costs the same."""
JOIN_STEPS = 50
"""Local steps of a site, or of a modality's tokenizer, that joins at the end."""
_PATCH, _LEARNING_RATE = (4, 4), 1e-3
_SUBJECTS_PER_STREAM, _HOLDOUT = 250, 300


def study_run(seed: int, *, steps: int, rounds: int = 1) -> RunConfig:
    """The experiment on raw pixels in small patches, as in the paper; `steps` are shared out evenly over the rounds.

    Block statistics are guessed from their constants: 3,000 steps on them teach no shape (LOG.md).
    """
    base = load_simulation(EXPERIMENT)
    train = {"rounds": rounds, "local_steps": steps // rounds, "learning_rate": _LEARNING_RATE}
    changed = {
        "seed": seed,
        "streams": {name: stream.model_copy(update={"patch": _PATCH}) for name, stream in base.streams.items()},
        "model": base.model.model_copy(update={"tokenizer": "patch"}),
        "train": base.train.model_copy(update=train),
    }
    return base.model_copy(update=changed)


def with_backbone(run: RunConfig, backbone: str, **experts: object) -> RunConfig:
    """The same run with a backbone of one cost, whichever it is."""
    (active,) = run.model.experts.active
    model = {
        "backbone": backbone,
        "hidden_multiple": DENSE_MULTIPLE if backbone == "dense" else DENSE_MULTIPLE // active,
        "experts": run.model.experts.model_copy(update=experts),
    }
    return run.model_copy(update={"model": run.model.model_copy(update=model)})


def write_draw(job: CohortJob) -> Path:
    """Write one draw; returns its folder."""
    run, subjects = study_run(0, steps=1), job.subjects or _SUBJECTS_PER_STREAM
    cohort = resized(cohort_of(run), job.draw, subjects=subjects, holdout=job.holdout or _HOLDOUT)
    return write_files(cohort, job.folder, run)


class Pictures(OpenedCohort):
    """A draw, read back; its labels are the shapes."""

    @property
    def trained(self) -> tuple[str, ...]:
        """Streams that some site has."""
        return tuple(stream for store in self.stores.values() for stream in store.images)

    @property
    def held_out(self) -> tuple[str, ...]:
        """Streams that no site has."""
        return tuple(stream for stream in self.holdout.store.images if stream not in self.trained)

    def read(self, model: PanModel, place: LabelledStore, split: str, streams: Sequence[str], route: Route) -> Classed:
        """Frozen features of the pictures of some streams, with modality and shape."""
        store = place.store
        modality = np.empty(len(store.subjects), dtype=np.dtypes.StringDType())
        for stream, rows in store.rows.items():
            modality[rows] = stream
        chosen = np.intersect1d(store.indices(split), np.concatenate([store.rows[stream] for stream in streams]))
        features = embed_store(FrozenReader(model, partial(model.embed, route=route)), store, chosen, streams)
        return Classed(features, modality[chosen], place.values(list(self.labels), chosen).argmax(axis=1))


def probe_own(
    pictures: Pictures, model: PanModel, place: LabelledStore, streams: Sequence[str], route: Route = "experts"
) -> list[float]:
    """AUC of a probe within each stream."""
    fit = pictures.read(model, place, "train", streams, route)
    test = pictures.read(model, pictures.holdout, "test", streams, route)
    return [score.auc for score in probe_each_modality(fit, test, streams).values()]


def probe_across(pictures: Pictures, model: PanModel, route: Route = "experts") -> dict[str, float]:
    """AUCs of the shapes over all streams that were trained, and the similarity of the streams' features."""
    streams = pictures.trained
    fit = pictures.read(model, pictures.together, "train", streams, route)
    test = pictures.read(model, pictures.holdout, "test", streams, route)
    own = probe_each_modality(fit, test, streams)
    left_out = leave_one_modality_out(fit, test, streams)
    cka = modality_cka(test.features, test.modality.tolist(), test.classes.tolist())
    return {
        "probe_own": float(np.mean([score.auc for score in own.values()])),
        "probe_pooled": probe_classes(fit, test).auc,
        "probe_lomo": float(np.mean([score.auc for score in left_out.values()])),
        "cka": float(np.nanmean(list(cka.values()))),
    }


def probe_joined(pictures: Pictures, run: RunConfig, state: Mapping[str, Tensor], *, frozen: bool) -> float:
    """AUC on the streams that no site had, after a few steps of training on them.

    Args:
        run: Of the model; under `sharing.experts = private` the experts start as copies of the directors.
        state: Of the trained model.
        frozen: Train the new streams' own parameters alone, instead of all as at a site.
    """
    streams = pictures.held_out
    train = run.train.model_copy(update={"rounds": 1, "local_steps": JOIN_STEPS})
    trainer = Trainer(run.model_copy(update={"train": train}), streams)
    own = trainer.model.state_dict()
    trainer.model.load_state_dict(own | {name: value for name, value in state.items() if name in own})
    groups = trainer.model.parameter_groups()
    for name, parameter in trainer.model.named_parameters():
        if frozen and stream_of(groups[name]) is None:
            parameter.requires_grad_(False)
    trainer.reset_private()
    seed_routing(trainer.model, run.seed)
    train_round(trainer, pictures.holdout.store, "new-site", 1)
    return float(np.mean(probe_own(pictures, trainer.model, pictures.holdout, streams)))


def print_result(result: StudyResult, arms: Sequence[str], metrics: Sequence[str], console: Console | None) -> None:
    """Print mean and standard deviation of every metric and arm, the answers, and the targets."""
    table = Table("", *(arm.replace("-", "-\n") for arm in arms), title=f"{result.name}: mean and sd over pairs")
    for metric in metrics:
        table.add_row(metric, *(mean_sd(result.values.get((metric, arm), []), "\n±") for arm in arms))
    print_study(result, table, console=console)
