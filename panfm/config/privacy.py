"""Differential privacy of a run: what is promised, what it is made of, and what would break it.

Privacy unit: a patient. Relation: add or remove one. N and q are public numbers, never computed from the data.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from panfm.config._base import Config, Positive, PositiveFloat
from panfm.config.server_privacy import server_claim

if TYPE_CHECKING:
    from panfm.config.run import RunConfig


NO_CLAIM = "noise only, no DP claim"
"""What every artefact of a run says that trains on although its guarantee is broken."""
_HABITS = {
    "seed": "noise and sampling come from the operating system, a known seed lets anybody subtract them; leave it out",
    "sampling": "batches are Poisson samples, the only kind that is accounted here; leave it out",
    "shuffle": "batches are Poisson samples, not a shuffled pass over the patients; leave it out",
    "batch-size": "a batch is a Poisson sample; set sample-rate",
    "adaptive-clipping": "the clip norm is fixed, following the data costs privacy; set clip-norm",
    "target-quantile": "the clip norm is fixed, following the data costs privacy; set clip-norm",
    "chunk": "patients are taken one at a time, so that none shows in another's gradient; leave it out",
    "release-loss": "raw losses and metrics do not leave a private site; leave it out",
    "release-counts": "raw counts do not leave a private site; set public-subjects",
}
"""Keys that other frameworks have -> why there is none here, and what to do."""


class PrivacyConfig(Config):
    """Patient-level differential privacy of all that leaves a site. Leave the table out to train without."""

    epsilon: PositiveFloat
    """Budget of every site, over all runs on its patients; a site's own smaller limit wins."""
    delta: Annotated[float, Field(gt=0.0, lt=1.0)]
    """Chance that epsilon does not hold; at most 1 / (10 public-subjects)."""
    public_subjects: Positive
    """Patients that a site is publicly known to have; stands for the true number wherever that would be seen."""
    noise_multiplier: PositiveFloat
    """Standard deviation of the gradient noise, in clip norms; `panfm ledger plan` computes it."""
    sample_rate: Annotated[float, Field(gt=0.0, le=1.0)]
    """Chance of each patient to be in a step, independently of all others."""
    clip_norm: PositiveFloat = 1.0
    """Largest L2 norm of one patient's gradient, over all trained parameters together."""
    trained: Literal["all", "vectors", "last-block"] = "all"
    """all parameters; vectors: norms, biases, embeddings and queries; last-block: the last block, last norm and heads.
    The noise grows with the square root of their number. The others stay as the run started them."""
    statistics_noise: PositiveFloat = 20.0
    """Standard deviation of the noise on a site's saliency, in its sensitivities; entered only if masking needs it."""
    acknowledge_broken_guarantee: bool = False
    """Train on although something breaks the guarantee; every artefact then says `noise only, no DP claim`."""

    @model_validator(mode="before")
    @classmethod
    def _habits_of_other_frameworks(cls, table: Any) -> Any:
        for key in table if isinstance(table, dict) else ():
            if key in _HABITS:
                raise ValueError(f"{key}: {_HABITS[key]}")
        return table


def broken_guarantees(run: "RunConfig") -> Iterator[str]:
    """What in a private run lets one patient's gradient, or an output, depend on other patients; one line each."""
    assert run.privacy is not None
    largest = 0.1 / run.privacy.public_subjects
    if run.privacy.delta > largest:
        yield f"privacy.delta: {run.privacy.delta:g} is above 1 / (10 public-subjects), set at most {largest:.3g}"
    if run.objective.name == "dino":
        yield 'objective.name: "dino" centres its targets over the batch, set "latent" or "mae"'
    if run.objective.name == "latent" and run.objective.standardise:
        yield "objective.standardise: running statistics couple patients, set false"
    if run.model.backbone == "director-experts" and any(run.model.experts.balance_weight):
        yield "model.experts.balance-weight: it pulls on the batch's mean, set [0.0, 0.0]"
    if run.masking.policy in ("sgm", "inverse") and run.masking.saliency == "value":
        yield 'masking.saliency: "value" is centred over the batch, set "attention", or masking.policy = "random"'


def claim(run: "RunConfig") -> str | None:
    """What a run may say of its patients' privacy; None if it is not private."""
    if run.privacy is None:
        return None
    if any(broken_guarantees(run)):
        return NO_CLAIM
    return f"({run.privacy.epsilon:g}, {run.privacy.delta:g})-DP per patient of one site, add-or-remove-one"


def privacy_label(run: "RunConfig") -> str:
    """What every artefact of a run says of its privacy."""
    return "; ".join(filter(None, (claim(run), server_claim(run)))) or "none"
