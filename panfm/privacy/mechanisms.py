"""The Gaussian mechanisms of a private round, and their epsilon.

    gradients   per step: S + N(0, (z C)^2), S the sum of clipped gradients over a Poisson sample of rate q
    saliency    per round: V + N(0, (z_s sqrt 2)^2), V the sum over all patients of (shares, equal split)

    site updates   per round, at the server, under site-level privacy: S + N(0, (z C)^2), S the sum of clipped updates

All are Gaussian; the accountant composes them as privacy loss random variables (PRV), whatever their order. Adding or
removing one patient is the relation (of site-level privacy: a site's updates or zero); a mechanism over all has rate 1.

A server chooses how many numbers the accountant works on. Where they would be too many, the bound from Renyi
differential privacy (RDP) takes its place: it is larger, and costs little.

Sources: Gopi, Lee & Wutschitz 2021, "Numerical Composition of Differential Privacy"; Mironov, Talwar & Zhang 2019,
"Renyi Differential Privacy of the Sampled Gaussian Mechanism"; both as in Opacus.
"""

import math
import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from panfm.config import RunConfig
from panfm.config.base import LEAST_NOISE
from panfm.config.masking import MaskingConfig
from panfm.errors import ProtocolError

SALIENCY_SENSITIVITY = math.sqrt(2.0)
"""Shares sum to 1 and so do equal splits: each has an L2 norm of at most 1."""
_MOST_POINTS = 1_600_000
"""Grid points of all different mechanisms together that PRV may use: 2 s and 200 MiB."""
_MOST_MECHANISMS = 8
"""Different mechanisms that PRV may compose: each takes a tenth of a second."""
_PADDED_FROM = 1 << 19
"""Grid points from which a grid is padded to a length whose Fourier transform needs little memory."""
_RDP_ORDERS = (1.25, 1.5, 1.75, 2, 2.5, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 48, 64, 96, 128, 256)
Unit = Literal["patient", "site"]
"""Whom a guarantee is for."""


@dataclass(frozen=True)
class Mechanism:
    """A Gaussian mechanism, and how often it is applied."""

    name: str
    releases: tuple[str, ...]
    """Parts of a reply that it protects."""
    sensitivity: float
    """L2 change that one patient can make."""
    noise: float
    """Standard deviation of the noise, in sensitivities."""
    rate: float
    """Chance of a patient to be in it."""
    count: int
    """Times."""


def planned(run: RunConfig, unit: Unit = "patient") -> tuple[Mechanism, ...]:
    """The mechanisms of one round: at one site, for its patients, or at the server, for sites."""
    if unit == "site":
        assert run.site_dp is not None
        clip_norm, noise = run.site_dp.clip_norm, run.site_dp.noise_multiplier
        return (Mechanism("site updates", ("global model",), clip_norm, noise, 1.0, 1),)
    assert run.patient_dp is not None
    private = run.patient_dp
    gradients = Mechanism(
        "gradients",
        ("updates",),
        private.clip_norm,
        private.noise_multiplier,
        private.sample_rate,
        run.train.local_steps,
    )
    if not needs_saliency(run.masking):
        return (gradients,)
    saliency = Mechanism("saliency", ("saliency",), SALIENCY_SENSITIVITY, private.statistics_noise, 1.0, 1)
    return gradients, saliency


def needs_saliency(masking: MaskingConfig) -> bool:
    """Whether masks are steered by more than the patient's own saliency."""
    return masking.steered_by in ("site", "federation")


def check_mechanism(mechanism: Mechanism, *, least_noise: float = LEAST_NOISE) -> None:
    """Refuse a mechanism that the accountant cannot account for, or that has less noise than any claim needs.

    Raises:
        ProtocolError: the number at fault, and what was expected.
    """
    noise, rate, sensitivity, count = mechanism.noise, mechanism.rate, mechanism.sensitivity, mechanism.count
    checks = [
        ("noise", noise, 0.0 < noise < math.inf and noise >= least_noise, f"a number of at least {least_noise:g}"),
        ("rate", rate, 0.0 < rate <= 1.0, "above 0, at most 1"),
        ("sensitivity", sensitivity, 0.0 < sensitivity < math.inf, "a number above 0"),
        ("count", count, isinstance(count, int) and count >= 1, "a whole number of at least 1"),
    ]
    for name, value, is_sound, expected in checks:
        if not is_sound:
            raise ProtocolError(f"privacy: {mechanism.name} have {name} {value:g}, expected {expected}")


def merged(mechanisms: Iterable[Mechanism]) -> tuple[Mechanism, ...]:
    """Equal mechanisms as one, with their counts added up."""
    counts = Counter[Mechanism]()
    for mechanism in mechanisms:
        counts[replace(mechanism, count=1)] += mechanism.count
    return tuple(replace(mechanism, count=count) for mechanism, count in counts.items())


def epsilon(mechanisms: Iterable[Mechanism], delta: float) -> float:
    """Epsilon of all mechanisms together at a delta.

    Guarantees:
        upper bound: it lies above the true epsilon, within 0.02 where PRV may count it, by some tenths of itself where
            RDP does; infinite where the accountant cannot tell it.
        a number: it is at least 0 and never NaN.
        cheap: seconds and memory are bounded, whatever the mechanisms.
    """
    history = Counter[tuple[float, float]]()
    for mechanism in mechanisms:
        history[mechanism.noise, mechanism.rate] += mechanism.count
    return _composed(tuple((noise, rate, count) for (noise, rate), count in sorted(history.items())), delta)


@lru_cache(maxsize=4096)
def _composed(history: tuple[tuple[float, float, int], ...], delta: float) -> float:
    """Epsilon of (noise, rate, count)."""
    if not history:
        return 0.0
    # The RDP bound warns when it is loose; at rate 1 the PRV takes the logarithm of 0.
    with warnings.catch_warnings(), np.errstate(divide="ignore", over="raise"):
        warnings.filterwarnings("ignore", message="Optimal order is the")
        try:
            spent = _prv(history, delta) if len(history) <= _MOST_MECHANISMS else None
            spent = _rdp(history, delta) if spent is None else spent
        except (ArithmeticError, MemoryError, RuntimeError, ValueError):  # too little noise for any finite grid
            return math.inf
    return math.inf if math.isnan(spent) else max(spent, 0.0)  # at a large delta the accountant's goes below 0


def _prv(history: tuple[tuple[float, float, int], ...], delta: float) -> float | None:
    """Epsilon by PRV; None if its grid would be too large."""
    from opacus.accountants import PRVAccountant
    from opacus.accountants.analysis.prv import Domain
    from scipy.fft import next_fast_len

    class TooLargeError(Exception):
        pass

    class Accountant(PRVAccountant):  # type: ignore[misc]
        def _get_domain(self, **sizes: Any) -> Domain:
            """The grid, known before anything of its size is allocated."""
            domain = super()._get_domain(**sizes)
            if domain.size * len(history) > _MOST_POINTS:
                raise TooLargeError
            if domain.size < _PADDED_FROM:
                return domain
            size = 2 * next_fast_len(domain.size // 2)
            margin = domain.dt * (size - domain.size) / 2
            return Domain(domain.t_min - margin, domain.t_max + margin, size)

    accountant = Accountant()
    accountant.history = list(history)
    try:
        return float(accountant.get_epsilon(delta=delta))
    except TooLargeError:
        return None


def _rdp(history: tuple[tuple[float, float, int], ...], delta: float) -> float:
    """Epsilon by RDP; infinite with less noise than any claim needs."""
    if min(noise for noise, _, _ in history) < LEAST_NOISE:
        return math.inf
    from opacus.accountants.analysis.rdp import get_privacy_spent

    spent = sum(count * _rdp_of(noise, rate) for noise, rate, count in history)
    return float(get_privacy_spent(orders=_RDP_ORDERS, rdp=spent, delta=delta)[0])


@lru_cache(maxsize=65536)
def _rdp_of(noise: float, rate: float) -> NDArray[np.float64]:
    """RDP of one application at each order."""
    from opacus.accountants.analysis.rdp import compute_rdp

    return np.asarray(compute_rdp(q=rate, noise_multiplier=noise, steps=1, orders=_RDP_ORDERS), dtype=np.float64)
