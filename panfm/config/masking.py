"""`[masking]`: which tokens are hidden from the student."""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from panfm.config.base import Config, Fraction, Positive, plug_in
from panfm.registry import MASKING_POLICIES

Scope = Literal["subject", "site", "federation"]
"""Whose saliency steers the masks."""


class MaskingConfig(Config):
    """Which tokens are hidden from the student. Every policy hides the same number of tokens per patient."""

    policy: Annotated[str, plug_in(MASKING_POLICIES)] = "sgm"
    """random: uniform; organ: whole streams; sgm: more of the streams that the model leans on; inverse: less of them;
    static: more of `static-organs`, always."""
    ratio: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.6
    """Share of a patient's tokens that is hidden."""
    saliency: Literal["attention", "value"] = "value"
    """attention: CLS row of the teacher's last block; value: CLS attention times the norm of the centred values, summed
    over all blocks."""
    scope: Scope = "site"
    """Whose saliency steers: this patient's, the site's running mean, or the mean the server sends."""
    strength: Annotated[float, Field(ge=0.0, le=100.0)] = 3.0
    """Slope of log-odds of hiding against log saliency."""
    limit: Annotated[float, Field(ge=1e-3, le=100.0)] = 3.0
    """Largest log-odds, either way: the most dominant stream is hidden more, but never always."""
    warmup_steps: Positive = 20
    """Local steps over which strength grows from 0."""
    settle_steps: Positive = 500
    """Local steps at full strength; over as many more it fades to what `balance` says."""
    balance: Fraction = 0.85
    """Once settled, guidance goes on only while the normalised entropy of the saliency over streams lies below this;
    0.1 below, at full strength."""
    static_organs: Annotated[tuple[str, ...], Field(strict=False)] = ("heart", "adipose")
    """Organs that `static` hides more."""

    @property
    def steered_by(self) -> Scope | None:
        """Whose saliency the policy reads; None if it reads none."""
        scope: Scope | None = MASKING_POLICIES.load(self.policy).steered_by(self.scope)
        return scope

    def couplings(self) -> Iterator[str]:
        """Yield what couples patients, as `key: why, remedy`, one line each; the policy's class declares it."""
        policy = MASKING_POLICIES.load(self.policy)
        if "couplings" not in vars(policy):  # what a class inherits was declared for another
            yield f'policy: "{self.policy}" does not declare whether it couples patients, set one that does'
        else:
            yield from policy.couplings(self)
