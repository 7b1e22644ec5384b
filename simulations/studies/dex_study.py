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

from collections.abc import Sequence
from functools import partial
from typing import Annotated, cast

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from torch import Tensor

from panfm.config import RunConfig
from panfm.data.store import ImageStore
from panfm.evaluate.representation import expert_modality_nmi, gradient_conflict, layer_gradients
from panfm.models import PanModel
from panfm.models.backbone import Routed
from panfm.models.director_experts import DirectorExperts, DirectorExpertsBackbone
from panfm.models.transfer import director_run, director_state
from panfm.models.vit import Block, VisionTransformer
from panfm.seeds import numpy_generator, torch_generator
from panfm.training.monitors import experts_used
from panfm.training.trainer import Trainer
from simulations.alone import train_round
from simulations.harness import ArmJob, StudyOptions, chosen_arms, run_arms, study
from simulations.studies._modalities import (
    Pictures,
    print_result,
    probe_across,
    probe_joined,
    study_run,
    with_backbone,
    write_draw,
)
from simulations.studies._released import ActivationFromZero, DirectorFirst, Released
from simulations.studies._routing import seed_routing
from simulations.study_result import StudyResult, Target

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
PROBES = ("probe_own", "probe_pooled", "probe_heldout", "probe_lomo")
SHOWN = ("nmi", "nmi_unit", "experts_used", "conflict", *PROBES, "cka", "val_loss")
_BATCH_SIZE = 64
_CONFLICT_PICTURES = 64
"""Of each modality."""


_DIRECTOR = "director:"
"""Prefix of metrics that are read through the directors."""
Arms = Annotated[str, typer.Option(help=f"Only these arms, with commas between; of these too: {', '.join(RELEASED)}.")]

_ALL = ",".join(ARMS)


@study(seeds=5, budgets=STEPS, unit="steps")
def main(options: StudyOptions, budget: str, arms: Arms = _ALL) -> StudyResult:
    """Director-Experts against dense, token-routed and randomly routed layers."""
    chosen = chosen_arms(arms, (*ARMS, *RELEASED))
    result = run(options, STEPS[budget], chosen)
    print_result(result, rows_of(chosen), SHOWN, None)
    return result


def rows_of(arms: Sequence[str]) -> list[str]:
    """Columns of the printed table; `dex` has a second one, for its directors."""
    return [row for row in ROWS if row.removesuffix("-director") in arms]


def _has_director(arm: str) -> bool:
    return arm == "dex" or arm in RELEASED


def run(options: StudyOptions, steps: int, arms: Sequence[str] = ARMS) -> StudyResult:
    """Run the study with some of the arms; its questions are answered where all arms are there that they name."""
    described = {arm: arm_run(0, arm, steps).model_dump(mode="json", by_alias=True) for arm in arms}
    result = StudyResult("dex", {"pairs": options.pairs(), "steps": steps, "arms": described})
    for job, measured in run_arms(options, arms, steps, write_draw, measure):
        through = {name.removeprefix(_DIRECTOR): measured[name] for name in measured if name.startswith(_DIRECTOR)}
        result.add(job.arm, {name: value for name, value in measured.items() if not name.startswith(_DIRECTOR)})
        result.add(f"{job.arm}-director", through)
    if {*ARMS} <= {*arms}:
        _add_answers(result)
        result.targets += targets(result)
    if "dex" in arms:
        _add_deviations(result, [arm for arm in arms if arm in RELEASED])
    return result


def arm_run(seed: int, arm: str, steps: int) -> RunConfig:
    """The run of one arm."""
    run = study_run(seed, steps=steps)
    run = run.model_copy(update={"train": run.train.model_copy(update={"batch_size": _BATCH_SIZE})})
    aligned = _has_director(arm) or arm in ("dense", "untrained")
    return with_backbone(run, BACKBONE_OF_ARM[arm], **({} if aligned else {"alignment_weight": 0.0}))


def measure(job: ArmJob) -> dict[str, float]:
    """Train one arm and measure it; metrics of the route through the directors begin with `director:`."""
    run = arm_run(job.seed, job.arm, job.length)
    pictures = Pictures.open(job.cohort, run)
    everyone = pictures.together.store
    trainer = Trainer(run)
    seed_routing(trainer.model, job.seed)
    if job.arm != "untrained":
        train_round(trainer, everyone, "study", 1)
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
        measured |= {f"{_DIRECTOR}{name}": value for name, value in through.items()}
    return measured


def conflict(trainer: Trainer, store: ImageStore) -> dict[str, float]:
    """Conflict between the modalities' gradients, in every block's MLP or experts."""
    features, losses = trainer.patch_features(store), {}
    for stream, rows in store.rows.items():
        training = np.intersect1d(rows, store.indices("train"))
        chosen = numpy_generator(trainer.run.seed, "conflict", stream).permutation(training)[:_CONFLICT_PICTURES]
        losses[stream] = partial(_loss, trainer, features, chosen, stream)
    conflicts = [gradient_conflict(rows) for rows in layer_gradients(losses, _layers(trainer.model))]
    measured = {f"block-{index}/conflict": layer.size for index, layer in enumerate(conflicts)}
    measured["conflict"] = float(np.mean([layer.size for layer in conflicts]))
    measured["conflict_share"] = float(np.mean([layer.share for layer in conflicts]))
    return measured


def _layers(model: PanModel) -> list[list[Tensor]]:
    """Parameters of each block's MLP, or of its experts."""
    layers = [cast(Block, block).mlp for block in cast(VisionTransformer, model.backbone).blocks]
    return [list((layer.experts if isinstance(layer, DirectorExperts) else layer).parameters()) for layer in layers]


def _loss(trainer: Trainer, features: ImageStore, chosen: NDArray[np.int64], stream: str) -> Tensor:
    """Loss of some pictures under one unguided mask, without noise on the routers."""
    batch = features.batch(chosen).to(trainer.device)
    masks = torch_generator(trainer.run.seed, "conflict", stream)
    return trainer.unguided_losses(batch, masks)[1].mean()


def specialisation(model: PanModel, pictures: Pictures) -> dict[str, float]:
    """Dependence between experts and modalities on held-out pictures; empty for a dense model."""
    store, streams = pictures.holdout.store, pictures.trained
    gates, names = [], []
    for stream in streams:
        chosen = np.intersect1d(store.rows[stream], store.indices("test"))
        with torch.inference_mode():
            routed = model.encode(model.patch_features(store.batch(chosen)).to(model.stream_of_patch.device)).routed
        gates.append([_gates(layer, len(chosen)) for layer in routed])
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


def _add_answers(result: StudyResult) -> None:
    """Add the questions of the study, as paired means and as shares of pairs."""
    result.ratios["nmi_dex"] = result.mean("nmi", "dex")
    for metric in ("nmi", "nmi_unit"):
        gain = result.gain(metric, "dex", "token-moe")
        result.ratios[f"{metric}_dex-minus-token-moe"] = float(np.mean(gain))
    for arm in ("dex", "token-moe", "random-routing"):
        result.ratios[f"conflict_{arm}_over_dense"] = result.mean("conflict", arm) / result.mean("conflict", "dense")
    for metric in PROBES:
        for arm in ("dex", "dex-director"):
            result.add_gain(metric, arm, "dense")


def _add_deviations(result: StudyResult, arms: Sequence[str]) -> None:
    """Add each released arm's gain on `dex`: paired mean, and half of its 95 % interval."""
    for arm in arms:
        for of in ("", "-director"):
            for metric in DEVIATIONS_SHOWN:
                if (metric, f"{arm}{of}") in result.values:
                    result.add_gain(metric, f"{arm}{of}", f"dex{of}", with_share=False, with_interval=True)


def targets(result: StudyResult) -> list[Target]:
    """Targets of Director-Experts."""
    ratios = result.ratios
    at_least_dense = ratios["probe_pooled/dex-at-least-dense"]
    return [
        Target("nmi of dex, deeper half", ratios["nmi_dex"], 0.4),
        Target("nmi, dex minus token-moe", ratios["nmi_dex-minus-token-moe"], 0.15),
        Target("one minus conflict of dex over dense", 1.0 - ratios["conflict_dex_over_dense"], 0.25),
        Target("share of pairs with probe_pooled of dex at least dense", at_least_dense, 0.8),
    ]
