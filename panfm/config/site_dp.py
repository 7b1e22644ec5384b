"""`[site-dp]`: site-level differential privacy of a run, by noise that the server adds.

Privacy unit: a site. Relation: its updates as they are, or all zero; who takes part, and with which streams, is public
and stays. The server is trusted with every site's updates.
"""

from collections.abc import Mapping
from typing import Annotated, ClassVar

from pydantic import Field

from panfm.config.base import LEAST_NOISE, Uncoupled


class SiteDpConfig(Uncoupled):
    """Site-level differential privacy of what the server publishes: global models and run folder. Every site's update
    is clipped as a whole, all sites weigh alike, the server adds noise; losses, counts and saliency stay at the sites.
    With ten sites this is arithmetic rather than protection: noise for a small epsilon drowns the mean. Leave the table
    out to train without."""

    habits: ClassVar[Mapping[str, str]] = {
        "seed": "noise comes from the operating system, a known seed lets anybody subtract it; leave it out",
        "adaptive-clipping": "the clip norm is fixed, following the updates costs privacy; set clip-norm",
        "target-quantile": "the clip norm is fixed, following the updates costs privacy; set clip-norm",
        "sample-rate": "all sites are in every round, the server knows them; leave it out",
    }
    epsilon: Annotated[float, Field(ge=0.01, le=1e3)]
    """Budget of the run."""
    delta: Annotated[float, Field(ge=1e-12, le=0.05)]
    """Chance that epsilon does not hold; at most 1 / (10 num-sites)."""
    num_sites: Annotated[int, Field(ge=2, le=100_000)]
    """Sites of the run: all of them, in every round. A round in which one does not answer releases nothing."""
    noise_multiplier: Annotated[float, Field(ge=LEAST_NOISE, le=1e4)]
    """Standard deviation of the noise on the sum of the updates, in clip norms; `panfm ledger plan` computes it."""
    clip_norm: Annotated[float, Field(ge=1e-3, le=64.0)] = 1.0
    """Largest L2 norm of a site's update, over all groups that it sends together."""
