"""Differential privacy of a run: what is promised, what it is made of, and what would break it.

Privacy unit: a patient. Relation: add or remove one. N and q are public numbers, never computed from the data.
"""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from panfm.config.base import LEAST_NOISE, ClipNorm, Config, Positive, Uncoupled
from panfm.config.site_dp import site_dp_claim

if TYPE_CHECKING:
    from panfm.config.run import RunConfig


NO_CLAIM = "noise only, no DP claim"
"""What every artefact of a run says that trains on although its guarantee is broken."""
_LARGEST_DELTA = 0.01
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


class PrivacyConfig(Uncoupled):
    """Patient-level differential privacy of all that leaves a site. Leave the table out to train without."""

    epsilon: Annotated[float, Field(ge=0.01, le=1e3)]
    """Budget of every site, over all runs on its patients; a site's own smaller limit wins."""
    delta: Annotated[float, Field(ge=1e-12, le=0.5)]
    """Chance that epsilon does not hold; at most 0.01, and at most 1 / (10 public-subjects)."""
    public_subjects: Positive
    """Patients that a site is publicly known to have; stands for the true number wherever that would be seen."""
    noise_multiplier: Annotated[float, Field(ge=1e-12, le=1e4)]
    """Standard deviation of the gradient noise, in clip norms, at least 0.3; `panfm ledger plan` computes it."""
    sample_rate: Annotated[float, Field(ge=1e-4, le=1.0)]
    """Chance of each patient to be in a step, independently of all others."""
    clip_norm: ClipNorm = 1.0
    """Largest L2 norm of one patient's gradient, over all trained parameters together."""
    trained: Literal["all", "vectors", "last-block"] = "all"
    """all parameters; vectors: norms, biases, embeddings and queries; last-block: the last block, last norm and heads.
    The noise grows with the square root of their number. The others stay as the run started them."""
    statistics_noise: Annotated[float, Field(ge=1e-12, le=1e4)] = 20.0
    """Standard deviation of the noise on a site's saliency, in its sensitivities, at least 0.3; entered only if masking
    needs it."""
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
    """What in a private run lets one patient's gradient, or an output, depend on other patients, and numbers that leave
    too little to promise; one line each. A table that does not declare what couples patients in it is such a thing."""
    assert run.privacy is not None
    private = run.privacy
    largest = min(0.1 / private.public_subjects, _LARGEST_DELTA)
    if private.delta > largest:
        yield f"privacy.delta: {private.delta:g} is above {_delta_rule(private)}, set at most {largest:.3g}"
    noises = {"noise-multiplier": private.noise_multiplier, "statistics-noise": private.statistics_noise}
    for key, noise in noises.items():
        if noise < LEAST_NOISE:
            yield f"privacy.{key}: {noise:g} protects nobody, set at least {LEAST_NOISE}"
    for key, table in _tables(run):
        yield from _couplings(table, key)


def _delta_rule(private: PrivacyConfig) -> str:
    return "1 / (10 public-subjects)" if 0.1 / private.public_subjects < _LARGEST_DELTA else f"{_LARGEST_DELTA:g}"


def _tables(run: "RunConfig") -> Iterator[tuple[str, Config]]:
    """Every table of a run, by its dotted key; those within a table are for that one to declare."""
    for name in type(run).model_fields:
        key, value = name.replace("_", "-"), getattr(run, name)
        if isinstance(value, Config):
            yield key, value
        elif isinstance(value, Mapping):
            yield from ((f"{key}.{inner}", table) for inner, table in value.items() if isinstance(table, Config))


def _couplings(table: Config, key: str) -> Iterator[str]:
    """What a table of the run declares to couple patients."""
    declared = getattr(table, "couplings", None)
    if declared is None:
        name = getattr(table, "name", type(table).__name__)
        yield f'{key}: "{name}" does not declare whether it couples patients, set one that does'
        return
    for line in declared():
        yield f"{key}.{line}"


def claim(run: "RunConfig") -> str | None:
    """What a run may say of its patients' privacy; None if it is not private."""
    if run.privacy is None:
        return None
    if any(broken_guarantees(run)):
        return NO_CLAIM
    return f"({run.privacy.epsilon:g}, {run.privacy.delta:g})-DP per patient of one site, add-or-remove-one"


def privacy_label(run: "RunConfig") -> str:
    """What every artefact of a run says of its privacy."""
    return "; ".join(filter(None, (claim(run), site_dp_claim(run)))) or "none"
