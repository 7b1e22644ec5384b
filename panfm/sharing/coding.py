"""Coding of updates: as they are, or rounded to two bytes or one per number, with error feedback to the next round.

    float32   as it is
    bf16      the upper half of each float32, rounded to nearest even, as uint16
    int8      q = round(u / s), s = largest |u| of the row / 127; int8 [size] and float32 [rows] under `<group>/scale`

A row is a run of at most 256 numbers of one parameter. Lossy codings have error feedback: a site adds to each update
what its last one lost, and keeps what this one loses, so that the sum of what arrived stays within one rounding of the
sum of what was meant, however many rounds there are.

Error of one decoded number:   float32 0    bf16 2^-8 |u|    int8 s / 2 (1 + 2^-15), that is 0.4 % of the row's largest

The server sends the global parameters as they are or, to a site that has those of the round before, the coded step:

    g_t = g_(t-1) + decode(encode(step_t + lost_(t-1)))      at the server and at every site, with the same bits

So the global parameters are what the coded steps add up to, for everyone. Digests of the parameters that a step leads
to travel with it: a site that arrives at others says so, and is sent all of them the next time. With float32 a step
would be as large as the parameters, so none is sent.

Source: error feedback, Seide et al. 2014 and Karimireddy et al. 2019 (arXiv 1901.09847); scales by blocks as in QSGD
(Alistarh et al. 2017, arXiv 1610.02132), without its random rounding, which feedback makes needless.
"""

import hashlib
import math
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from panfm.errors import ProtocolError
from panfm.sharing.groups import Flat, GroupManifest

Coding = Literal["float32", "bf16", "int8"]
Arrays = Mapping[str, NDArray[Any]]
"""Updates as they travel: group -> numbers, `<group>/scale` -> scales of its rows."""

_ROW = 256
_LARGEST = 127
SCALE = "/scale"
_TINY = np.finfo(np.float32).tiny


def encode_with_feedback(
    coding: Coding, manifest: GroupManifest, updates: Mapping[str, Flat], lost: Mapping[str, Flat]
) -> tuple[Arrays, dict[str, Flat]]:
    """Code updates with error feedback; also returns the rounding errors, by group.

    Args:
        updates: Group -> packed update.
        lost: Group -> what the round before lost; nothing for a group that lost nothing.
    """
    if coding == "float32":
        return dict(updates), {}
    meant = {group: update + lost[group] if group in lost else update for group, update in updates.items()}
    arrays = encode(coding, manifest, meant)
    return arrays, {group: meant[group] - arrived for group, arrived in decode(coding, manifest, arrays).items()}


def encode(coding: Coding, manifest: GroupManifest, updates: Mapping[str, Flat]) -> Arrays:
    """Code packed updates."""
    arrays: dict[str, NDArray[Any]] = {}
    for group, update in updates.items():
        if coding == "int8":
            arrays[group], arrays[group + SCALE] = _to_int8(update, _row_lengths(manifest, group))
        else:
            arrays[group] = _to_bf16(update) if coding == "bf16" else update
    return arrays


def decode(coding: Coding, manifest: GroupManifest, arrays: Arrays) -> dict[str, Flat]:
    """Decode updates; arrays that belong to no group are returned as they are, for the guards to refuse.

    Raises:
        ProtocolError: an array is missing or has another dtype or size.
    """
    updates = dict(arrays)
    for group in manifest.groups.keys() & arrays.keys() if coding != "float32" else ():
        size, lengths = manifest.size(group), _row_lengths(manifest, group)
        if coding == "int8":
            scales = _expect(group + SCALE, updates.pop(group + SCALE, None), np.float32, len(lengths))
            updates[group] = _from_int8(_expect(group, arrays[group], np.int8, size), np.repeat(scales, lengths))
        else:
            updates[group] = _from_bf16(_expect(group, arrays[group], np.uint16, size))
    return updates


def _row_lengths(manifest: GroupManifest, group: str) -> NDArray[np.intp]:
    sizes = (math.prod(shape) for _, shape in manifest.groups[group])
    lengths = [min(_ROW, size - start) for size in sizes for start in range(0, size, _ROW)]
    return np.array(lengths, dtype=np.intp)


def _to_int8(update: Flat, lengths: NDArray[np.intp]) -> tuple[NDArray[np.int8], Flat]:
    """Numbers and scales. A number that is not finite makes its row's scale so, which the guards will see."""
    largest: Flat = np.maximum.reduceat(np.abs(update), np.cumsum(lengths) - lengths) if len(lengths) else update
    scales: Flat = largest / np.float32(_LARGEST)
    scales[scales < _TINY] = 0.0
    steps = np.repeat(np.where(scales == 0.0, np.float32(1.0), scales), lengths)
    with np.errstate(invalid="ignore"):
        return np.rint(update / steps).astype(np.int8), scales


def _from_int8(numbers: NDArray[np.int8], steps: Flat) -> Flat:
    with np.errstate(invalid="ignore", over="ignore"):
        return numbers * steps


def _to_bf16(update: Flat) -> NDArray[np.uint16]:
    bits = update.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(update), np.uint32(0x7FC0), rounded).astype(np.uint16)


def _from_bf16(numbers: NDArray[np.uint16]) -> Flat:
    return (numbers.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _expect(name: str, array: NDArray[Any] | None, dtype: type[np.generic], size: int) -> NDArray[Any]:
    if array is None or array.dtype != dtype or array.shape != (size,):
        given = "nothing" if array is None else f"{array.dtype} {list(array.shape)}"
        raise ProtocolError(f"{name} is {given}, expected {np.dtype(dtype)} [{size}]")
    return array


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
