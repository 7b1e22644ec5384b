"""Masking policies: how the hidden tokens of a subject are spread over its streams.

A policy gives every stream a score, the log-odds of hiding its tokens (`token_mask.py` draws by them):

    random   0
    sgm      clip(strength(t) x log r, +-limit)      r: saliency of the stream relative to an equal split
    inverse  the same, sign turned
    static   +strength for `static-organs`, 0 for the others
    organ    random order of the streams, whole streams until the budget is spent

    strength(t) = strength x min(t / warmup-steps, 1) x (f(t) + (1 - f(t)) g)
    f(t)        1 for the first `settle-steps` local steps, over as many more by cosine to 0
    g           1 where the saliency's normalised entropy is 0.1 or more below `balance`, linearly to 0 at `balance`

Dominance is learned in the first few hundred steps, so guidance is full there, and limits itself by log r. Later it
costs more than it gains (the dominant streams must be learned too), unless dominance lasts, which g measures. The
schedule counts steps, not shares of the run, because dominance rises and falls with the steps taken
(simulations/studies/LOG.md).

To add a policy, write its class and a line in `MASKING_POLICIES` (`panfm/registry.py`). This file is read with a run
description, so torch is imported for type checking alone.

Source: Pan-FM (arXiv 2605.07055) for guiding masks by saliency; formula and schedule are this project's.
Shape legend: B subjects, S streams.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, ClassVar, assert_never

from panfm.config.masking import MaskingConfig, Scope

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_LEAST_RELATIVE_SALIENCY = 0.05
"""Saliency below this share of an equal split counts as this share, so that no stream is left out for good."""
_BALANCE_RANGE = 0.1
"""Entropy below `balance` at which guidance that lasts has its full strength."""


def no_couplings(_config: MaskingConfig) -> Iterator[str]:
    """Yield nothing: a policy that reads no saliency couples no patients."""
    return iter(())


def saliency_couplings(config: MaskingConfig) -> Iterator[str]:
    """Yield what couples patients under a policy that reads saliency, as `key: why, remedy`, one line each.

    Whatever its scope, saliency of more than one patient steers masks only after noise, as a mechanism of its own.
    """
    match config.saliency:
        case "attention":
            return
        case "value":
            yield 'saliency: "value" is centred over the batch, set "attention", or masking.policy = "random"'
        case _:
            assert_never(config.saliency)


class MaskingPolicy(ABC):
    """Base of all policies. Each class also declares `couplings`, or private runs refuse it."""

    is_guided: ClassVar[bool] = False
    """Whether saliency steers the masks; a policy that does not say so sees an equal split."""
    noise: ClassVar[float] = 1.0
    """Scale of the Gumbel noise that is added to each token's score."""

    def __init__(self, config: MaskingConfig, organs: Sequence[str]) -> None:
        """Read the options; `organs` has the organ of each stream."""
        self.config = config
        self.organs = organs

    @classmethod
    def steered_by(cls, scope: Scope) -> Scope | None:
        """Whose saliency the policy reads, `federation` if it needs the profile of all sites; None if it reads none."""
        return scope if cls.is_guided else None

    @abstractmethod
    def scores(self, relative: "Tensor", num_subjects: int, step: int, generator: "torch.Generator") -> "Tensor":
        """Log-odds of hiding, per stream.

        Args:
            relative: Saliency relative to an equal split, [B, S] or [1, S]; 1 = as much as an equal split, 0 = absent.
            num_subjects: B.
            step: Local steps taken since the start of the run.
            generator: For a policy that draws; on the CPU.
        Returns:
            [B, S] or [1, S].
        """


class RandomPolicy(MaskingPolicy):
    """Hides tokens of all streams alike."""

    couplings = staticmethod(no_couplings)

    def scores(self, relative: "Tensor", num_subjects: int, step: int, generator: "torch.Generator") -> "Tensor":
        """Zero for every stream."""
        return relative.new_zeros(relative.shape)


class OrganPolicy(MaskingPolicy):
    """Hides whole streams, in random order."""

    couplings = staticmethod(no_couplings)
    noise = 1e-6

    def scores(self, relative: "Tensor", num_subjects: int, step: int, generator: "torch.Generator") -> "Tensor":
        """A uniform number per subject and stream, far above the noise of a token."""
        order = relative.new_empty((num_subjects, relative.shape[1]), device="cpu")
        return order.uniform_(generator=generator)


class StaticPolicy(MaskingPolicy):
    """Always hides more of the organs that the description names."""

    couplings = staticmethod(no_couplings)

    def scores(self, relative: "Tensor", num_subjects: int, step: int, generator: "torch.Generator") -> "Tensor":
        """Strength for `static-organs`, 0 for the others."""
        chosen = [float(organ in self.config.static_organs) for organ in self.organs]
        return self.config.strength * relative.new_tensor([chosen], device="cpu")


class SaliencyPolicy(MaskingPolicy):
    """Hides more of the streams that the model leans on (SGM)."""

    couplings = staticmethod(saliency_couplings)
    is_guided = True

    def scores(self, relative: "Tensor", num_subjects: int, step: int, generator: "torch.Generator") -> "Tensor":
        """Log of the saliency, times the strength of guidance at this step, within the limit."""
        strength = self.config.strength * self.guidance(relative, step)
        scores = strength * relative.clamp_min(_LEAST_RELATIVE_SALIENCY).log()
        return scores.clamp(-self.config.limit, self.config.limit)

    def guidance(self, relative: "Tensor", step: int) -> "Tensor":
        """Share of `strength` in force at a step, [B, 1] or [1, 1]: rise, then settle to what imbalance asks for."""
        from panfm.training.saliency import normalised_entropy

        config = self.config
        rise = min((step + 1) / config.warmup_steps, 1.0)
        fade = 0.5 * (1.0 + math.cos(math.pi * min(max(step / config.settle_steps - 1.0, 0.0), 1.0)))
        lasting = ((config.balance - normalised_entropy(relative)) / _BALANCE_RANGE).clamp(0.0, 1.0)
        return rise * (fade + (1.0 - fade) * lasting)


class InversePolicy(SaliencyPolicy):
    """Hides less of the streams that the model leans on."""

    couplings = staticmethod(saliency_couplings)

    def scores(self, relative: "Tensor", num_subjects: int, step: int, generator: "torch.Generator") -> "Tensor":
        """Scores of `sgm` with the sign turned."""
        return -super().scores(relative, num_subjects, step, generator)
