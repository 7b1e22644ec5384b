"""Refuses a round whose global parameters hold NaN or infinity.

Training from them gives nothing of use, and under privacy a patient's gradient would then be there or not, depending on
which of the model's parts the patient's images go through.
"""

import math
from collections.abc import Mapping

import numpy as np

from panfm.errors import ProtocolError
from panfm.sharing.groups import Flat


def check_finite(
    round_number: int, groups: Mapping[str, Flat], teacher: Mapping[str, Flat], profile: Mapping[str, float] | None
) -> None:
    """Raise ProtocolError if what the server sent for a round is not finite.

    Args:
        groups: Global parameters, coded steps taken.
        teacher: The server's average of them; empty if it sends none.
        profile: Saliency by stream.
    """
    for kind, arrays in (("global parameters", groups), ("teacher", teacher)):
        for group, array in arrays.items():
            if not bool(np.isfinite(array).all()):
                raise ProtocolError(f"round {round_number}: {kind} of group {group} hold NaN or infinity")
    for stream, value in (profile or {}).items():
        if not math.isfinite(value):
            raise ProtocolError(
                f"round {round_number}: saliency of stream {stream} is {value}, expected a finite number"
            )
