"""`[patient-dp]`: patient-level differential privacy of all that leaves a site.

Privacy unit: a patient. Relation: add or remove one. N and q are public numbers, never computed from the data.
"""

from collections.abc import Mapping
from typing import Annotated, ClassVar

from pydantic import Field

from panfm.config.base import ClipNorm, Positive, Uncoupled


class PatientDpConfig(Uncoupled):
    """Patient-level differential privacy of all that leaves a site. Leave the table out to train without."""

    habits: ClassVar[Mapping[str, str]] = {
        "trained": "what is trained is named alike in all runs; set train.parts",
        "seed": "noise and sampling come from the system, a known seed lets anybody subtract them; leave it out",
        "sampling": "batches are Poisson samples, the only kind that is accounted here; leave it out",
        "shuffle": "batches are Poisson samples, not a shuffled pass over the patients; leave it out",
        "batch-size": "a batch is a Poisson sample; set sample-rate",
        "adaptive-clipping": "the clip norm is fixed, following the data costs privacy; set clip-norm",
        "target-quantile": "the clip norm is fixed, following the data costs privacy; set clip-norm",
        "chunk": "patients are taken one at a time, so that none shows in another's gradient; leave it out",
        "release-loss": "raw losses and metrics do not leave a private site; leave it out",
        "release-counts": "raw counts do not leave a private site; set public-subjects",
    }
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
    """Largest L2 norm of one patient's gradient, over all trained parameters together (`train.parts`): the noise grows
    with the square root of their number."""
    statistics_noise: Annotated[float, Field(ge=1e-12, le=1e4)] = 20.0
    """Standard deviation of the noise on a site's saliency, in its sensitivities, at least 0.3; entered only if masking
    needs it."""
    acknowledge_broken_guarantee: bool = False
    """Train on although something breaks the guarantee; every artefact then says `noise only, no DP claim`."""
