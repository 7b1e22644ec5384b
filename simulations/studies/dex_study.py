"""Gains of Director-Experts over dense layers, and over sparse layers that are routed otherwise.

Ten-modality pictures in one place, masked autoencoding, the same data, steps and active parameters in every arm:

    dense           one MLP per block
    token-moe       experts that every token chooses by itself
    random-routing  experts that every picture is given at random, once and for all; no router learns
    dex             experts that every picture chooses by its CLS token, with their director
    dex-director    the same model, read through its directors alone: a dense ViT
    untrained       the dense model before its first step

Asked for by name (`--arms`), `dex` as the authors' released code computes it (`_released.py`):

    dex-activation-zero   the running activation starts at 0, not even
    dex-director-first    the director moves before the optimiser's step, not after it
    dex-released          both

The alignment to the director is off where there is none (token-moe, random-routing). `nmi` is between the expert with
most of a picture's gates and its modality (`nmi_unit`: of what is routed, which may be a token), `conflict` between the
gradients of the modalities in MLPs or experts. Both are means over blocks (nmi: over the deeper half); `block-<i>/...`
are the blocks' own. Probes are AUCs over the six shapes.
"""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, cast

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from torch import Tensor

from panfm.config import RunConfig
from panfm.data.store import ImageStore
from panfm.evaluate.representation import expert_modality_nmi, experts_used, gradient_conflict, layer_gradients
from panfm.models import PanModel
from panfm.models.backbone import Routed
from panfm.models.director_experts import DirectorExperts, DirectorExpertsBackbone
from panfm.models.transfer import director_run, director_state
from panfm.models.vit import Block, VisionTransformer
from panfm.seeds import numpy_generator, torch_generator
from panfm.training.trainer import Trainer
from simulations.harness import (
    Draws,
    FirstSeed,
    JsonFile,
    Seeds,
    StudyOptions,
    StudyResult,
    Target,
    check_writable,
    run_jobs,
    steps_of,
)
from simulations.studies._modalities import (
    CohortJob,
    Pictures,
    half_interval,
    print_result,
    probe_across,
    probe_joined,
    study_run,
    with_backbone,
    write_draw,
)
from simulations.studies._released import ActivationFromZero, DirectorFirst, Released
from simulations.studies._routing import seed_routing

STEPS = {"short": 500, "medium": 3000, "long": 8000}
RELEASED: dict[str, type[DirectorExpertsBackbone]] = {
    "dex-activation-zero": ActivationFromZero,
    "dex-director-first": DirectorFirst,
    "dex-released": Released,
}
BACKBONE_OF_ARM = {
    "dense": "dense",
    "untrained": "dense",
    "dex": "director-experts",
    "token-moe": "token-routing",
    "random-routing": "random-routing",
    **{arm: arm for arm in RELEASED},
}
ARMS = ("dense", "token-moe", "random-routing", "dex", "untrained")
ROWS = ("dense", "token-moe", "random-routing", "dex", "dex-director", *RELEASED, "untrained")
DEVIATIONS_SHOWN = ("nmi", "conflict", "probe_own", "probe_pooled", "probe_heldout", "val_loss")
SHOWN = (
    "nmi",
    "nmi_unit",
    "experts_used",
    "conflict",
    "probe_own",
    "probe_pooled",
    "probe_heldout",
    "probe_lomo",
    "cka",
    "val_loss",
)
_BATCH_SIZE = 64
_CONFLICT_PICTURES = 64
"""Of each modality."""


@dataclass(frozen=True)
class Job:
    """One arm, trained once and measured."""

    draw: int
    seed: int
    arm: str
    steps: int
    folder: Path

    def __str__(self) -> str:
        return f"pictures {self.draw}, seed {self.seed}, {self.arm}, {self.steps} steps"


def main(
    seeds: Seeds = 5,
    draws: Draws = 1,
    first_seed: FirstSeed = 0,
    budget: Annotated[str, typer.Option(help="short, medium or long: 500, 3,000 or 8,000 steps.")] = "short",
    arms: Annotated[
        str, typer.Option(help=f"Only these arms, with commas between; of these too: {', '.join(RELEASED)}.")
    ] = ",".join(ARMS),
    json: JsonFile = None,
) -> None:
    """Director-Experts against dense, token-routed and randomly routed layers."""
    size, chosen = steps_of(budget, STEPS), arms_of(arms)
    check_writable(json)
    result = run(StudyOptions(seeds, draws, first_seed, json=json), size, chosen)
    print_result(result, rows_of(chosen), SHOWN, None)
    if json:
        result.write(json)


def arms_of(names: str) -> list[str]:
    """Arms by their names, in the study's order. Raises BadParameter: there is none of a name."""
    known, wanted = (*ARMS, *RELEASED), names.split(",")
    if unknown := sorted({*wanted} - {*known}):
        raise typer.BadParameter(f"{unknown[0]}: expected some of {', '.join(known)}", param_hint="--arms")
    return [arm for arm in known if arm in wanted]


def rows_of(arms: Sequence[str]) -> list[str]:
    """Columns of the printed table; `dex` has a second one, for its directors."""
    return [row for row in ROWS if row.removesuffix("-director") in arms]


def _has_director(arm: str) -> bool:
    return arm == "dex" or arm in RELEASED


def run(options: StudyOptions, steps: int, arms: Sequence[str] = ARMS) -> StudyResult:
    """Run the study with some of the arms; its questions are answered where all arms are there that they name."""
    described = {arm: arm_run(0, arm, steps).model_dump(mode="json", by_alias=True) for arm in arms}
    result = StudyResult("dex", {"pairs": options.pairs(), "steps": steps, "arms": described})
    with tempfile.TemporaryDirectory() as scratch:
        draws = options.draw_numbers()
        written = run_jobs(
            write_draw, [CohortJob(draw, Path(scratch) / str(draw)) for draw in draws], workers=options.workers
        )
        folders = dict(zip(draws, written, strict=True))
        jobs = [Job(draw, seed, arm, steps, folders[draw]) for draw, seed in options.pairs() for arm in arms]
        done = run_jobs(measure, jobs, workers=options.workers, keep_for=options.json)
    for job, measured in zip(jobs, done, strict=True):
        result.add(job.arm, {name: value for name, value in measured.items() if not name.startswith("director:")})
        result.add(f"{job.arm}-director", _under(measured, "director:"))
    if {*ARMS} <= {*arms}:
        result.ratios.update(_answers(result))
        result.targets += targets(result)
    if "dex" in arms:
        result.ratios.update(_deviations(result, [arm for arm in arms if arm in RELEASED]))
    return result


def _under(measured: Mapping[str, float], prefix: str) -> dict[str, float]:
    return {name.removeprefix(prefix): value for name, value in measured.items() if name.startswith(prefix)}


def arm_run(seed: int, arm: str, steps: int) -> RunConfig:
    """The run of one arm."""
    run = study_run(seed, steps=steps)
    run = run.model_copy(update={"train": run.train.model_copy(update={"batch_size": _BATCH_SIZE})})
    aligned = _has_director(arm) or arm in ("dense", "untrained")
    return with_backbone(run, BACKBONE_OF_ARM[arm], **({} if aligned else {"alignment_weight": 0.0}))


def measure(job: Job) -> dict[str, float]:
    """Train one arm and measure it; metrics of the route through the directors begin with `director:`."""
    run = arm_run(job.seed, job.arm, job.steps)
    pictures = Pictures.open(job.folder, run)
    everyone = pictures.together.store
    trainer = Trainer(run)
    seed_routing(trainer.model, job.seed)
    if job.arm != "untrained":
        trainer.train(
            everyone, everyone.indices("train"), first_step=0, num_steps=job.steps, site="study", round_number=1
        )
    measured = {"val_loss": trainer.validate(everyone, everyone.indices("val"), site="study").loss}
    measured |= conflict(trainer, everyone) | specialisation(trainer.model, pictures)
    return measured | probes(pictures, run, trainer.model, job.arm)


def probes(pictures: Pictures, run: RunConfig, model: PanModel, arm: str) -> dict[str, float]:
    """All probes of an arm's trained model."""
    run = run.model_copy(update={"sharing": run.sharing.model_copy(update={"experts": "pooled"})})
    measured = probe_across(pictures, model)
    measured["probe_heldout"] = probe_joined(pictures, run, model.state_dict(), frozen=True)
    if _has_director(arm):
        through = probe_across(pictures, model, "director")
        through["probe_heldout"] = probe_joined(pictures, director_run(run), director_state(model), frozen=True)
        measured |= {f"director:{name}": value for name, value in through.items()}
    return measured


def conflict(trainer: Trainer, store: ImageStore) -> dict[str, float]:
    """Conflict between the modalities' gradients, in every block's MLP or experts."""
    maps, losses = trainer.stem(store), {}
    for stream, rows in store.rows.items():
        held = np.intersect1d(rows, store.indices("train"))
        chosen = numpy_generator(trainer.run.seed, "conflict", stream).permutation(held)[:_CONFLICT_PICTURES]
        losses[stream] = partial(_loss, trainer, maps, chosen, stream)
    found = [gradient_conflict(rows) for rows in layer_gradients(losses, _layers(trainer.model))]
    measured = {f"block-{index}/conflict": each.size for index, each in enumerate(found)}
    measured["conflict"] = float(np.mean([each.size for each in found]))
    measured["conflict_share"] = float(np.mean([each.share for each in found]))
    return measured


def _layers(model: PanModel) -> list[list[Tensor]]:
    """Parameters of each block's MLP, or of its experts."""
    layers = [cast(Block, block).mlp for block in cast(VisionTransformer, model.backbone).blocks]
    return [list((layer.experts if isinstance(layer, DirectorExperts) else layer).parameters()) for layer in layers]


def _loss(trainer: Trainer, maps: ImageStore, chosen: NDArray[np.int64], stream: str) -> Tensor:
    """Loss of some pictures under one unguided mask, without noise on the routers."""
    batch = maps.batch(chosen).to(trainer.device)
    masks = torch_generator(trainer.run.seed, "conflict", stream)
    return trainer.unguided_losses(batch, masks)[1].mean()


def specialisation(model: PanModel, pictures: Pictures) -> dict[str, float]:
    """Dependence between experts and modalities on held-out pictures; empty for a dense model."""
    store, streams = pictures.holdout.store, pictures.trained
    gates, names = [], []
    for stream in streams:
        chosen = np.intersect1d(store.rows[stream], store.indices("test"))
        with torch.inference_mode():
            routed = model.encode(model.stem(store.batch(chosen)).to(model.stream_of_place.device)).routed
        gates.append([_gates(each, len(chosen)) for each in routed])
        names += [stream] * len(chosen)
    layers = [np.concatenate(layer) for layer in zip(*gates, strict=True)]
    if not layers:
        return {}
    pictures_nmi = [expert_modality_nmi(layer.mean(axis=1), names) for layer in layers]
    units = np.repeat(names, layers[0].shape[1]).tolist()
    measured = {f"block-{index}/nmi": value for index, value in enumerate(pictures_nmi)}
    deeper = slice(len(layers) // 2, None)
    measured["nmi"] = float(np.mean(pictures_nmi[deeper]))
    measured["nmi_unit"] = float(np.mean([expert_modality_nmi(_flat(layer), units) for layer in layers[deeper]]))
    measured["experts_used"] = float(np.mean([experts_used(_flat(layer)) for layer in layers[deeper]]))
    return measured


def _gates(routed: Routed, num_pictures: int) -> NDArray[np.float32]:
    """Gates [N, U, R] of the U units of each picture that were routed: its tokens, or the picture itself."""
    full = torch.zeros_like(routed.probs).scatter_(1, routed.chosen, routed.gates)
    return full.view(num_pictures, -1, full.shape[1]).cpu().numpy()


def _flat(gates: NDArray[np.float32]) -> NDArray[np.float32]:
    return gates.reshape(-1, gates.shape[2])


def _answers(result: StudyResult) -> dict[str, float]:
    """The questions of the study, as paired means and as shares of pairs."""
    answers = {
        "nmi_dex": result.mean("nmi", "dex"),
        "nmi_dex-minus-token-moe": _gain(result, "nmi", "dex", "token-moe", np.mean),
        "nmi_unit_dex-minus-token-moe": _gain(result, "nmi_unit", "dex", "token-moe", np.mean),
    }
    for arm in ("dex", "token-moe", "random-routing"):
        answers[f"conflict_{arm}_over_dense"] = result.mean("conflict", arm) / result.mean("conflict", "dense")
    for metric in ("probe_own", "probe_pooled", "probe_heldout", "probe_lomo"):
        for arm in ("dex", "dex-director"):
            answers[f"{metric}/{arm}-minus-dense"] = _gain(result, metric, arm, "dense", np.mean)
            answers[f"{metric}/{arm}-at-least-dense"] = _gain(
                result, metric, arm, "dense", lambda gain: np.mean(gain >= 0)
            )
    return answers


def _deviations(result: StudyResult, arms: Sequence[str]) -> dict[str, float]:
    """What each arm of the released code gains on `dex`: paired mean, and half of its 95 % interval."""
    answers = {}
    for arm in arms:
        for of in ("", "-director"):
            for metric in DEVIATIONS_SHOWN:
                if (metric, f"{arm}{of}") in result.values:
                    gain = np.array(result.gain(metric, f"{arm}{of}", f"dex{of}"))
                    answers[f"{metric}/{arm}{of}-minus-dex{of}"] = float(gain.mean())
                    answers[f"{metric}/{arm}{of}-minus-dex{of}/half-interval"] = half_interval(gain)
    return answers


def targets(result: StudyResult) -> list[Target]:
    """Targets of the study."""
    found = result.ratios
    return [
        Target("nmi of dex, deeper half", found["nmi_dex"], 0.4),
        Target("nmi, dex minus token-moe", found["nmi_dex-minus-token-moe"], 0.15),
        Target("one minus conflict of dex over dense", 1.0 - found["conflict_dex_over_dense"], 0.25),
        Target("share of pairs with probe_pooled of dex at least dense", found["probe_pooled/dex-at-least-dense"], 0.8),
    ]


def _gain(
    result: StudyResult, metric: str, arm: str, baseline: str, reduce: Callable[[NDArray[np.float64]], Any]
) -> float:
    return float(reduce(np.array(result.gain(metric, arm, baseline))))
