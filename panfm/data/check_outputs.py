"""What the model sees of one image: the check's rules for scaled and resampled images, and for one among others.

Faults (`ImageError`): a single slice; one value all over, in the scan or in the part that a run's shape shows; nearly
all voxels at the ends of the range; four values or fewer; CT that is not in Hounsfield units. The rest is a note: few
values, grey levels in a small part of the range, CT without a voxel below 0, little of the run's shape filled, an image
out of line with the others of its stream.
"""

from collections.abc import Iterator, Mapping
from dataclasses import astuple, dataclass, fields
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from panfm.anatomy import Modality, parse_stream
from panfm.config import StreamConfig
from panfm.data.intensity import EMPTY_PART, HU_WINDOW, apply_intensity, check_varies, is_constant, picture_levels
from panfm.data.read import prepare
from panfm.data.readers import ImageError, Picture, Volume

K = TypeVar("K")
_MOST_CLIPPED = 0.99
_MOST_WHITE_CT, _WHITE_CT_WITHOUT_AIR = 0.25, 0.05
_LEAST_PADDING, _LEAST_AIR, _MOST_SHIFTED = 0.005, 0.001, 0.8
"""Least shares: of voxels with the smallest value, if that is padding; of voxels below the CT window, if there is air;
of the voxels above the window, those in the range of soft tissue plus 1024, if 1024 was added."""
_FLAT = 1e-3
"""An MR or PET image is flat if its range of values, divided by its median, is below this."""
_MANY_SLICES = 8
_MASK_VALUES, _FEW_VALUES, _FEWEST_VOXELS = 4, 16, 64
_SQUEEZED, _MUCH_WHITE = 0.05, 0.5
_LEAST_FILLED = 0.1
_SAMPLE = 1 << 16
_FEWEST_OTHERS, _DEVIATIONS, _LEAST_DEVIATION = 8, 6.0, 0.02
_MAD_TO_SIGMA = 1.4826


@dataclass(frozen=True)
class Output:
    """Statistics of one prepared image, in [0, 1]."""

    mean: float
    deviation: float
    black: float
    """Share of voxels at 0."""
    white: float
    """Share of voxels at 1."""

    @classmethod
    def of(cls, prepared: NDArray[np.float32]) -> "Output":
        """Measure a prepared image."""
        black, white = float((prepared <= 0.0).mean()), float((prepared >= 1.0).mean())
        return cls(float(prepared.mean(dtype=np.float64)), float(prepared.std(dtype=np.float64)), black, white)


def inspect_output(image: Volume | Picture, stream: str, config: StreamConfig | None) -> tuple[Output, tuple[str, ...]]:
    """Prepare one image as a run does, and look at the result.

    Args:
        config: The run's stream; without it, the image is scaled but not resampled.
    Returns:
        Statistics of what the model sees, and notes.
    Raises:
        ImageError: it shows nothing, or is not what the stream says.
    """
    modality = parse_stream(stream)[1]
    if isinstance(image, Volume):
        if min(image.voxels.shape) == 1:
            shape = "x".join(map(str, image.voxels.shape))
            raise ImageError(f"a single slice ({shape})", "a volume of several slices")
        scaled = apply_intensity(image.voxels, modality, nan_to_zero=config is not None and config.nan == "zero")
    else:
        scaled, modality = _scaled_picture(image, config), Modality.PHOTO
    _check_scaled(scaled, image, modality)
    prepared = scaled
    if config:
        prepared = prepare(image, stream, config)
        if is_constant(prepared):
            raise ImageError(EMPTY_PART, "voxels that differ")
    return Output.of(prepared), tuple(_notes(scaled, prepared, image, modality, config))


def out_of_line(outputs: Mapping[K, Output]) -> Iterator[tuple[K, str]]:
    """Images of one stream that differ from most others, and how; none where there are too few to say."""
    if len(outputs) < _FEWEST_OTHERS:
        return
    table = np.array([astuple(output) for output in outputs.values()])
    middle = np.median(table, axis=0)
    spread = _MAD_TO_SIGMA * np.median(np.abs(table - middle), axis=0)
    away = np.abs(table - middle) / np.maximum(spread, _LEAST_DEVIATION)
    for key, row, distances in zip(outputs, table, away, strict=True):
        if distances.max() > _DEVIATIONS:
            at = int(distances.argmax())
            name = fields(Output)[at].name
            yield key, f"out of line with the others of its stream: {name} {row[at]:.3f}, theirs {middle[at]:.3f}"


def _scaled_picture(image: Picture, config: StreamConfig | None) -> NDArray[np.float32]:
    levels = picture_levels(image, config.channels if config else 3, config.window if config else None)
    return np.asarray(levels) if levels.mode == "F" else apply_intensity(np.asarray(levels), Modality.PHOTO)


def _check_scaled(scaled: NDArray[np.float32], image: Volume | Picture, modality: Modality) -> None:
    output = Output.of(scaled)
    if modality is Modality.CT and (output.white >= _MOST_WHITE_CT or _is_offset_ct(image, output.white)):
        raise ImageError(f"{output.white:.0%} of a CT above {HU_WINDOW[1]:g}", "Hounsfield units (was 1024 added?)")
    check_varies(scaled, modality)
    if output.black + output.white >= _MOST_CLIPPED:
        share = f"{output.black + output.white:.1%}"
        raise ImageError(f"{share} of its voxels at the ends of the range", "an image, not a mask or an empty scan")
    if scaled.size >= _FEWEST_VOXELS and (values := _distinct(scaled)) <= _MASK_VALUES:
        raise ImageError(f"{values} different values", "an image, not a mask or a map of labels")
    if isinstance(image, Volume):
        _check_variation(image.voxels, modality)


def _check_variation(voxels: NDArray[Any], modality: Modality) -> None:
    """Raise ImageError for a volume that repeats one slice, or whose values hardly differ."""
    for axis in range(3):
        slices = np.moveaxis(voxels, axis, 0)
        if len(slices) >= _MANY_SLICES and (slices == slices[0]).all():
            raise ImageError(f"one slice, {len(slices)} times", "a volume of several slices")
        if len(slices) >= _MANY_SLICES and np.count_nonzero([(slab != slab.flat[0]).any() for slab in slices]) == 1:
            raise ImageError(f"one of {len(slices)} slices that shows anything", "a volume of several slices")
    if modality in (Modality.MR, Modality.PET):
        least, middle, most = np.nanpercentile(voxels, (1, 50, 99))
        if least < most < least + _FLAT * abs(middle):
            raise ImageError(f"voxels within {most - least:.3g} of {middle:.6g}", "voxels that differ")


def _notes(
    scaled: NDArray[np.float32],
    prepared: NDArray[np.float32],
    image: Volume | Picture,
    modality: Modality,
    config: StreamConfig | None,
) -> Iterator[str]:
    sample = _sample(scaled)
    middle = sample[(sample > 0.0) & (sample < 1.0)]
    if scaled.size >= _FEWEST_VOXELS and (values := _distinct(scaled)) <= _FEW_VALUES:
        yield f"{values} different values: a map of labels?"
    elif len(middle) >= _FEWEST_VOXELS and (span := np.ptp(np.percentile(middle, (5, 95)))) < _SQUEEZED:
        yield f"most grey levels lie within {span:.1%} of the range: padding, or a few extreme voxels?"
    if (white := Output.of(scaled).white) >= _MUCH_WHITE:
        yield f"{white:.0%} of its voxels at the top of the range: is its window too narrow?"
    if modality is Modality.CT and _no_air(image):
        yield "a CT without a voxel below 0: are these Hounsfield units?"
    if isinstance(image, Volume):
        filled = [prepared.any(axis=tuple({0, 1, 2, 3} - {axis})).mean() for axis in (1, 2, 3)] if config else [1.0]
        if min(filled) < _LEAST_FILLED:
            yield f"fills {min(filled):.0%} of the run's shape along one axis"
    elif image.mode.startswith("I") and not (config and config.window):
        yield "16-bit grey, scaled by its own 1st to 99th percentile: the stream gives no window"
    if not isinstance(image, Volume) and "applied" in image.info:
        yield str(image.info["applied"])


def _is_offset_ct(image: Volume | Picture, white: float) -> bool:
    """Whether a CT looks like Hounsfield units plus 1024: tissue has the values of bone, and no voxel those of air."""
    if not isinstance(image, Volume) or white < _WHITE_CT_WITHOUT_AIR:
        return False
    voxels = image.voxels.ravel()
    if np.mean(voxels == voxels.min()) >= _LEAST_PADDING:
        voxels = voxels[voxels != voxels.min()]
    above = voxels[voxels >= HU_WINDOW[1]]
    shifted = np.mean((above >= 1024 + HU_WINDOW[0]) & (above <= 1024 + HU_WINDOW[1])) if above.size else 0.0
    return _no_air(image) or bool(np.mean(voxels < HU_WINDOW[0]) < _LEAST_AIR and shifted >= _MOST_SHIFTED)


def _no_air(image: Volume | Picture) -> bool:
    return isinstance(image, Volume) and float(np.nanmin(image.voxels)) >= 0.0


def _distinct(scaled: NDArray[np.float32]) -> int:
    return len(np.unique(_sample(scaled)))


def _sample(scaled: NDArray[Any]) -> NDArray[Any]:
    flat = scaled.reshape(-1)
    return flat[:: flat.size // _SAMPLE | 1]
