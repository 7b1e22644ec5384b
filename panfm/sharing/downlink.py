"""Coding of global parameters for sites: a site that holds those of the round before is sent the step alone.

    g_t = g_(t-1) + decode(encode(step_t + lost_(t-1)))      at the server and at every site, with the same bits

So the global parameters are what the coded steps add up to, for everyone; what a coding loses of a step, the server
adds to the next one (error feedback, coding.py). Digests of the parameters that a step leads to travel with it: a site
that does not arrive there says so, and is sent all of them next time. float32 would gain nothing, and sends no steps.
"""

import hashlib
from collections.abc import Mapping

import numpy as np

from panfm.errors import ProtocolError
from panfm.sharing.coding import Arrays, Coding, decode, encode_with_feedback
from panfm.sharing.groups import Flat, GroupManifest


def code_step(
    coding: Coding, manifest: GroupManifest, group: str, step: Flat, lost: Mapping[str, Flat]
) -> tuple[Arrays, dict[str, Flat]]:
    """Code a group's step; also returns its rounding error.

    Args:
        step: float32 [size]; -0.0 where nobody trained, which then loses nothing and makes up for nothing.
        lost: Group -> what the step before lost; nothing for a group that lost nothing.
    """
    idle = (step == 0) & np.signbit(step)
    owed = {group: np.where(idle, np.float32(0.0), lost[group])} if group in lost else {}
    arrays, loses = encode_with_feedback(coding, manifest, {group: step}, owed)
    if group in lost:
        loses[group][idle] = lost[group][idle]
    return arrays, loses


def take_step(coding: Coding, manifest: GroupManifest, groups: Mapping[str, Flat], step: Arrays) -> dict[str, Flat]:
    """Global parameters after a coded step; groups without one, and numbers whose step is 0, keep their bytes.

    Raises:
        ProtocolError: the step is of other groups, or not coded as said.
    """
    decoded = decode(coding, manifest, step)
    if unknown := sorted(decoded.keys() - groups.keys()):
        raise ProtocolError(f"step of group {unknown[0]!r:.40}, expected some of {', '.join(groups)}")
    return {group: _moved(flat, decoded[group]) if group in decoded else flat for group, flat in groups.items()}


def digests(groups: Mapping[str, Flat]) -> dict[str, str]:
    """Group -> hex digest of its parameters."""
    return {group: hashlib.sha256(flat.data).hexdigest()[:16] for group, flat in groups.items()}


def _moved(flat: Flat, step: Flat) -> Flat:
    moved = flat.copy()
    np.add(flat, step, out=moved, where=step != 0)
    return moved
