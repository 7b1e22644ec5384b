"""Audit by inversion: computes a patient's images back from a gradient, in closed form.

A token is x = W p + b + e + s with p the patch and s its position, which is fixed and so known. Of a gradient, the rows
of the patch layer's part, sum_n z_n p_n^T, span the patches that were seen; those of the first attention's part,
sum_n d_n h_n^T, span h_n = gamma C x_n / r_n + beta, their tokens after the first norm (C centres, r_n scales). With
V and H orthonormal bases of the two, and a patch n whose position is s_n,

    (1 - H^T H) (gamma C (W V^T c + b + e + s_n) + beta r) = 0,     p_n = V^T c

are linear equations in c and r. They hold at patches that were seen and at no others, so what is left over tells the
mask. All this works while the tokens that were seen, CLS included, are fewer than the model is wide: for one patient in
any model, for many in a wide one. AdamW hides most of it behind signs and a second patient of the same streams mixes
with the first; neither is a protection that anybody has proved. Clipping changes nothing, noise does.

Source: APRIL (Lu et al., CVPR 2022) recovers patches through learned positions, which this model has not; that fixed
ones, being known, do as well is this project's.
Shape legend: T patches of a stream, F features of a patch, D width, R rank.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from panfm.anatomy import module_name
from panfm.config import RunConfig
from panfm.config.patient_dp import PatientDpConfig
from panfm.data.store import ImageStore
from panfm.errors import DataError
from panfm.models import PanModel
from panfm.models.pan import StreamTokenizer
from panfm.models.patch_features import intensities, patchify
from panfm.models.vit import Block, VisionTransformer
from panfm.privacy.private_step import clipped_sum
from panfm.privacy.randomness import with_noise
from panfm.training.trainer import Trainer

_ATTENTION = "backbone.blocks.0.attention.qkv.weight"
_FLOOR = 3e-6
"""Singular values below this share of the largest are rounding of float32."""
_PLAIN = PatientDpConfig(
    epsilon=1.0, delta=1e-9, public_subjects=1, noise_multiplier=1.0, sample_rate=1.0, acknowledge_broken_guarantee=True
)
"""For a run that is not private, and claims nothing: clipping changes nothing here."""
Gradient = Mapping[str, Tensor]


@dataclass(frozen=True)
class Scenario:
    """Result of inverting one kind of gradient: peak signal-to-noise ratios in dB, one per patient."""

    name: str
    psnr: Sequence[float]
    """Of the patches that the attack takes for seen, clipped to [0, 1]."""
    grey: Sequence[float]
    """Of the best single grey instead."""
    other: Sequence[float]
    """Of another patient's patches at the same positions instead."""


def invert(model: PanModel, gradient: Gradient) -> dict[str, tuple[Tensor, Tensor]]:
    """Solve for the patches float64 [T, F] of every stream; also returns the residual at each patch, [T].

    Streams whose part of the gradient is zero or missing are left out; all are where the first attention's is.
    """
    attention = gradient.get(_ATTENTION)
    if attention is None or not bool(attention.any()):
        return {}
    assert isinstance(model.backbone, VisionTransformer)
    block = model.backbone.blocks[0]
    rows = _row_space(attention)
    outside = torch.eye(model.width, dtype=torch.float64) - rows.T @ rows
    assert isinstance(block, Block)
    gamma, beta = (value.detach().cpu().double() for value in (block.norm1.weight, block.norm1.bias))
    centred = (outside * gamma) @ (torch.eye(model.width, dtype=torch.float64) - 1.0 / model.width)
    solved = {}
    for name, tokenizer in zip(model.stream_names, model.streams.values(), strict=True):
        part = gradient.get(f"streams.{module_name(name)}.project.weight")
        if part is not None and bool(part.any()):
            assert isinstance(tokenizer, StreamTokenizer)
            solved[name] = _solve(tokenizer, _row_space(part), centred, outside @ beta)
    return solved


def _solve(tokenizer: StreamTokenizer, patches: Tensor, centred: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    weight = tokenizer.project.weight.detach().cpu().double()
    known = (tokenizer.project.bias + tokenizer.embedding + tokenizer.position).detach().cpu().double()
    right = -(centred @ known.T)
    left = torch.cat([centred @ weight @ patches.T, beta[:, None]], dim=1)
    solved = torch.linalg.lstsq(left, right, driver="gelsd").solution
    over = torch.linalg.vector_norm(left @ solved - right, dim=0) / torch.linalg.vector_norm(right, dim=0)
    return solved[: len(patches)].T @ patches, over


def _row_space(gradient: Tensor) -> Tensor:
    """Orthonormal rows [R, F] that span those of a gradient [D, F], up to rounding."""
    _, values, rows = torch.linalg.svd(gradient.cpu().double(), full_matrices=False)
    return rows[values > _FLOOR * values[0]]


def audit_inversion(
    model: PanModel, run: RunConfig, stores: Sequence[ImageStore], *, patients: int = 8
) -> list[Scenario]:
    """Invert gradients of the next step on some patients of some sites, each alone and in sums.

    Args:
        run: The model's; its objective, masks, trained part and noise are used. Noise 1 where it is not private.
        patients: How many are attacked, sites in turn.
    Raises:
        DataError: no patient holds a stream of the model.
    """
    attacked = Attacked(model, run, stores)
    chosen = attacked.patients(patients)
    noise = attacked.privacy.noise_multiplier
    alone = [[patient] for patient in chosen]
    scenarios = [
        attacked.scenario("one patient", alone, attacked.gradient),
        attacked.scenario("one patient, as AdamW moves the model", alone, attacked.adamw_update),
        attacked.scenario(f"sum over {len(chosen)} patients", [chosen], attacked.gradient),
        attacked.scenario("one patient, noise 0.001", alone, partial(attacked.gradient, noise=1e-3)),
        attacked.scenario(f"one patient, noise {noise:g}", alone, partial(attacked.gradient, noise=noise)),
    ]
    if len(stores) > 1:
        summed = attacked.scenario("sum over sites, one patient each", attacked.one_each(), attacked.gradient)
        scenarios.insert(3, summed)
    return scenarios


Patient = tuple[int, int]
"""Site and patient, as places in the stores and in the site's."""


class Attacked:
    """A model and the patients whose gradients are inverted."""

    def __init__(self, model: PanModel, run: RunConfig, stores: Sequence[ImageStore]) -> None:
        self.privacy = run.patient_dp or _PLAIN
        one_step = run.train.model_copy(update={"weight_decay": 0.0, "proximal_mu": 0.0, "rounds": 1, "local_steps": 1})
        changed = {
            "patient_dp": self.privacy,
            "train": one_step,
            "augment": None,
        }  # images as they are: easiest to find
        self.run = run.model_copy(update=changed)
        self.trainer = Trainer(self.run, model.stream_names)
        self.trainer.model.load_state_dict(model.state_dict())
        self.trainer.reset_private()
        self.features = [self.trainer.patch_features(store) for store in stores]

    def patients(self, number: int) -> list[Patient]:
        """The first patients of the train splits, sites in turn. Raises DataError if there are none."""
        lists = [store.indices("train").tolist() for store in self.features]
        turns = [(site, own[turn]) for turn in range(number) for site, own in enumerate(lists) if turn < len(own)]
        if not (holders := [patient for patient in turns if self.truth(patient)]):
            raise DataError("inversion: no patient in the train split holds a stream of the model")
        return holders[:number]

    def one_each(self) -> list[list[Patient]]:
        """At most four sums, each of one patient from every site."""
        lists = [store.indices("train").tolist() for store in self.features]
        return [[(site, index) for site, index in enumerate(row)] for row in zip(*lists, strict=False)][:4]

    def gradient(self, patients: Sequence[Patient], noise: float = 0.0) -> Gradient:
        """The clipped sum of a private step; noise in clip norms."""
        total: dict[str, Tensor] = {}
        for site, patient in patients:
            own = clipped_sum(self.trainer, self.features[site], np.array([patient]))
            total = {name: value + total.get(name, 0.0) for name, value in own.items()}
        deviation = noise * self.privacy.clip_norm
        return {name: with_noise(value, deviation) if noise else value for name, value in total.items()}

    def adamw_update(self, patients: Sequence[Patient]) -> Gradient:
        """Movement of the model by one step of the run's optimiser; the model is restored."""
        model = self.trainer.model
        before = {name: value.detach().clone() for name, value in model.named_parameters()}
        self.trainer.set_gradient({name: value.float() for name, value in self.gradient(patients).items()})
        self.trainer.update(0.5)
        moved = {name: value.detach() - before[name] for name, value in model.named_parameters()}
        model.load_state_dict(before)
        self.trainer.reset_private()
        return moved

    def scenario(
        self, name: str, sums: Sequence[Sequence[Patient]], gradient: Callable[[Sequence[Patient]], Gradient]
    ) -> Scenario:
        """Attack each sum and compare what comes out with the patients in it."""
        scores = np.array([self._score(patients, gradient(patients)) for patients in sums])
        return Scenario(name, *(column.tolist() for column in scores.T))

    def _score(self, patients: Sequence[Patient], gradient: Gradient) -> tuple[float, float, float]:
        """PSNR of the attack, of plain grey and of another patient, at the places that the attack takes for visible.

        Where several patients are in the sum, each patch is compared with the one who is nearest: the attack's luck.
        """
        inverted = invert(self.trainer.model, gradient)
        truths = [self.truth(patient) for patient in patients]
        names = [name for name in truths[0] if name in inverted] or list(truths[0])
        seen = self._seen({name: inverted[name][1] for name in names}, truths[0]) if inverted else None
        errors: list[Tensor] = []
        true, others = [], []
        for name in names:
            at = slice(None) if seen is None else seen[name]
            own, other = truths[0][name][at], self._other(patients, name)[at]
            if inverted:
                patches = self.intensities(name, inverted[name][0])[at]
                squares = [(patches - truth[name][at]).square().mean(dim=1) for truth in truths if name in truth]
                errors.append(torch.stack(squares).min(dim=0).values)
            true.append(own)
            others.append((own - other).square().mean(dim=1))
        grey = torch.cat([own.flatten() for own in true])
        best = _psnr((grey - grey.mean()).square())
        return (_psnr(torch.cat(errors)) if inverted else best), best, _psnr(torch.cat(others))

    def _seen(self, over: Mapping[str, Tensor], truth: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Guess the visible patches: the public number of visible ones, those with the smallest residual."""
        count = sum(len(patches) for patches in truth.values())
        hidden = min(max(round(self.run.masking.ratio * count), 1), count - 1)
        limit = torch.cat(list(over.values())).sort().values[: count - hidden][-1]
        return {name: torch.nonzero(values <= limit).squeeze(1) for name, values in over.items()}

    def _other(self, patients: Sequence[Patient], name: str) -> Tensor:
        """Another patient's stream; its own where there is no other."""
        site, own = patients[0]
        holders = [index for index in self.features[site].rows[name].tolist() if (site, index) not in patients]
        return self.truth((site, holders[0] if holders else own))[name]

    def truth(self, patient: Patient) -> dict[str, Tensor]:
        """Intensities of a patient's patches [T, F], by stream."""
        batch, patches = self.features[patient[0]].batch([patient[1]]), {}
        for name, tokenizer in zip(self.trainer.model.stream_names, self.trainer.model.streams.values(), strict=True):
            if name in batch.images:
                assert isinstance(tokenizer, StreamTokenizer)
                patches[name] = self.intensities(name, patchify(batch.images[name], tokenizer.step)[0])
        return patches

    def intensities(self, name: str, patches: Tensor) -> Tensor:
        """Image intensities of patches [T, F] of a stream, in [0, 1]."""
        stream = self.run.streams[name]
        return intensities(patches.double(), stream, self.run.model.tokenizer).clamp(0.0, 1.0)


def _psnr(squares: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of squared errors, peak 1; at most 200."""
    return -10.0 * math.log10(max(float(squares.mean()), 1e-20))
