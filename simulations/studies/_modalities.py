"""Parts that the studies of Director-Experts share: ten-modality pictures, frozen probes, a modality that joins.

Every picture shows one of six shapes in one of ten modalities. Nine stand at the sites; the last, which nobody has, is
for transfer: its tokenizer is trained for a few steps on a frozen backbone, then its shapes are probed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from scipy import stats
from torch import Tensor

from panfm.config import RunConfig, site_folders
from panfm.data.store import Batch, join_stores
from panfm.evaluate.classes import Classed, leave_one_modality_out, probe_classes, probe_each_modality
from panfm.evaluate.embed import embed_store
from panfm.evaluate.probe_labels import LabelledStore, read_label_info
from panfm.evaluate.representation import modality_cka
from panfm.models import PanModel
from panfm.models.backbone import Route
from panfm.report.console_tables import number_text
from panfm.sharing.groups import stream_of
from panfm.training.trainer import Trainer
from simulations.cohorts.picture_cohort import PictureCohort
from simulations.cohorts.prepare import cohort_of, load_simulation
from simulations.harness import QUICKSTART, StudyResult
from simulations.studies._routing import seed_routing

EXPERIMENT = QUICKSTART.with_name("dex-ten-modalities.toml")
"""The run that these studies start from."""
DENSE_MULTIPLE = 4
"""Hidden width of a dense MLP over the model's; experts get this over the number that is active, so that a picture
costs the same."""
JOIN_STEPS = 50
"""Local steps of a site, or of a modality's tokenizer, that joins at the end."""
_PATCH, _LEARNING_RATE = (4, 4), 1e-3
_SUBJECTS_PER_STREAM, _HOLDOUT = 250, 300


@dataclass(frozen=True)
class CohortJob:
    """One draw of the cohort, written as files."""

    draw: int
    folder: Path
    subjects: int = _SUBJECTS_PER_STREAM
    """Patients of each stream at its site."""
    holdout: int = _HOLDOUT
    """Patients of each stream at no site."""

    def __str__(self) -> str:
        return f"pictures {self.draw}: writing files"


def study_run(seed: int, *, steps: int, rounds: int = 1) -> RunConfig:
    """The experiment on raw pixels in small patches, as in the paper, for steps that a site takes in equal rounds.

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
    """Write one draw and build its caches; returns its folder."""
    run = study_run(0, steps=1)
    cohort = cohort_of(run)
    assert isinstance(cohort, PictureCohort)
    sites = {
        name: site.model_copy(update={"subjects": job.subjects * len(site.streams)})
        for name, site in cohort.sites.items()
    }
    changed = {"seed": job.draw, "sites": sites, "holdout_subjects": job.holdout}
    cohort.model_copy(update=changed).write(job.folder, run.streams)
    Pictures.open(job.folder, run)
    return job.folder


@dataclass(frozen=True)
class Pictures:
    """A draw, read back."""

    sites: Mapping[str, LabelledStore]
    holdout: LabelledStore
    shapes: tuple[str, ...]
    """Labels, one per shape."""

    @classmethod
    def open(cls, folder: Path, run: RunConfig) -> "Pictures":
        """Open a folder that `write_draw` wrote."""
        sites = {each.name: LabelledStore.open(each, run.streams) for each in site_folders(folder / "sites")}
        return cls(sites, LabelledStore.open(folder / "holdout", run.streams), tuple(read_label_info(folder)))

    @property
    def together(self) -> LabelledStore:
        """All sites' pictures in one place."""
        places = list(self.sites.values())
        labels = {name: np.concatenate([place.labels[name] for place in places]) for name in self.shapes}
        return LabelledStore(join_stores([place.store for place in places]), labels)

    @property
    def trained(self) -> tuple[str, ...]:
        """Streams that some site has."""
        return tuple(stream for place in self.sites.values() for stream in place.store.images)

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
        features = embed_store(_Reader(model, route), store, chosen, streams)
        return Classed(features, modality[chosen], place.values(self.shapes, chosen).argmax(axis=1))


@dataclass(frozen=True)
class _Reader:
    """Embeds route the experts or route the directors."""

    model: PanModel
    route: Route

    def eval(self) -> object:
        return self.model.eval()

    def embed(self, batch: Batch) -> Tensor:
        return self.model.embed(batch, route=self.route)


def probe_own(
    pictures: Pictures, model: PanModel, place: LabelledStore, streams: Sequence[str], route: Route = "experts"
) -> list[float]:
    """AUC of a probe within each stream."""
    fit = pictures.read(model, place, "train", streams, route)
    test = pictures.read(model, pictures.holdout, "test", streams, route)
    return [score.auc for score in probe_each_modality(fit, test, streams).values()]


def probe_across(pictures: Pictures, model: PanModel, route: Route = "experts") -> dict[str, float]:
    """AUC of a probe of shapes over all streams that were trained, and similarity of the streams."""
    streams = pictures.trained
    fit = pictures.read(model, pictures.together, "train", streams, route)
    test = pictures.read(model, pictures.holdout, "test", streams, route)
    own = probe_each_modality(fit, test, streams)
    left_out = leave_one_modality_out(fit, test, streams)
    return {
        "probe_own": float(np.mean([score.auc for score in own.values()])),
        "probe_pooled": probe_classes(fit, test).auc,
        "probe_lomo": float(np.mean([score.auc for score in left_out.values()])),
        "cka": float(
            np.nanmean(list(modality_cka(test.features, test.modality.tolist(), test.classes.tolist()).values()))
        ),
    }


def probe_joined(
    pictures: Pictures,
    run: RunConfig,
    state: Mapping[str, Tensor],
    *,
    frozen: bool,
) -> float:
    """AUC on the streams that no site had, once they have joined.

    Args:
        run: Of the model; under `sharing.experts = private` the experts start as copies of the directors.
        state: Of the trained model.
        frozen: Only what belongs to the new streams is trained; else everything is, as at a site.
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
    store = pictures.holdout.store
    trainer.train(store, store.indices("train"), first_step=0, num_steps=JOIN_STEPS, site="new-site", round_number=1)
    return float(np.mean(probe_own(pictures, trainer.model, pictures.holdout, streams)))


def half_interval(gains: NDArray[np.float64]) -> float:
    """Half of the 95 % interval of a mean, by Student's t; NaN for a single pair."""
    if len(gains) < 2:
        return float("nan")
    return float(stats.t.ppf(0.975, len(gains) - 1) * gains.std(ddof=1) / np.sqrt(len(gains)))


def print_result(result: StudyResult, arms: Sequence[str], metrics: Sequence[str], console: Console | None) -> None:
    """Mean and standard deviation of every metric and arm, the answers, and the targets."""
    console = console or Console(soft_wrap=True, highlight=False)
    table = Table("", *(arm.replace("-", "-\n") for arm in arms), title=f"{result.name}: mean and sd over pairs")
    for metric in metrics:
        table.add_row(metric, *(_mean_sd(result.values.get((metric, arm), ())) for arm in arms))
    console.print(table)
    for name, value in result.ratios.items():
        console.print(f"{name}: {value:+.3f}")
    for target in result.targets:
        console.print(target)


def _mean_sd(values: Sequence[float]) -> str:
    if not len(values):
        return "-"
    spread = np.std(values, ddof=1) if len(values) > 1 else 0.0
    return f"{number_text(float(np.mean(values)))}\n±{number_text(float(spread))}"
