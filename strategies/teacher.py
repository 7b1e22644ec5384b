"""The server's EMA of the global parameters, for sites whose teacher starts a round there.

e <- e + (1 - m) (g - e)     after each round, from e = g before round 1; m: `train.server-ema`
"""

from collections.abc import Mapping

import numpy as np

from panfm.sharing.groups import Flat


def follow(average: Mapping[str, Flat], groups: Mapping[str, Flat], momentum: float) -> dict[str, Flat]:
    """The average after a round. A number that is where its average is stays, to the bit."""
    share = np.float32(1.0 - momentum)
    return {group: average[group] + share * (flat - average[group]) for group, flat in groups.items()}
