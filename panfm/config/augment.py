"""`[augment]`: how the images of a step are varied."""

from dataclasses import dataclass
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from panfm.anatomy import Modality, parse_stream
from panfm.config.base import Fraction, Uncoupled
from panfm.config.streams import StreamConfig
from panfm.texts import toml_key

Axis = Literal["height", "width", "R", "A", "S"]
Flips = Annotated[tuple[Axis, ...], Field(strict=False, max_length=3)]
CropShare = Annotated[float, Field(ge=0.01, le=1.0)]
Crop = Annotated[tuple[CropShare, CropShare], Field(strict=False)]
Angle = Annotated[float, Field(ge=0.0, le=3.15)]
Strength = Annotated[float, Field(ge=0.0, le=0.9)]

_FLIPS: dict[Modality, tuple[Axis, ...]] = {
    Modality.PATHOLOGY: ("height", "width"),
    Modality.PHOTO: ("height", "width"),
    Modality.ENDOSCOPY: ("height", "width"),
    Modality.FUNDUS: ("width",),
    Modality.OCT: ("width",),
    Modality.ULTRASOUND: ("width",),
}
"""Axes along which a picture's mirror image is as likely as the picture; none where organs have a side."""
_MR_BIAS_FIELD = 0.1


class StreamAugmentConfig(Uncoupled):
    """How the images of one stream are varied, where it differs from `[augment]` or from what its modality suggests."""

    crop: Crop | None = None
    rotation: Angle | None = None
    brightness: Strength | None = None
    contrast: Strength | None = None
    gamma: Strength | None = None
    blur: Fraction | None = None
    noise: Strength | None = None
    flips: Flips | None = None
    """Axes along which half of the images are flipped: `height` and `width` of pictures, `R`, `A` and `S` of volumes.
    Left out: both axes of pathology, photographs and endoscopy, the width of fundus, OCT and ultrasound, else none."""
    bias_field: Strength | None = None
    """Greatest coefficient of a smooth field's logarithm (polynomials of degree 1 and 2), by which images are
    multiplied. Left out: 0.1 of MR, else 0."""


@dataclass(frozen=True)
class Strengths:
    """How the images of one stream are varied."""

    crop: tuple[float, float]
    rotation: float
    brightness: float
    contrast: float
    gamma: float
    blur: float
    noise: float
    flips: tuple[Axis, ...]
    bias_field: float

    @property
    def moves(self) -> bool:
        """Whether images are cropped, rotated or flipped."""
        return self.crop != (1.0, 1.0) or self.rotation > 0.0 or bool(self.flips)


class AugmentConfig(Uncoupled):
    """Vary the images of every step, drawn for each patient. Leave the table out to train on images as they are."""

    crop: Crop = (0.25, 1.0)
    """Least and greatest share of an image's area or volume that is cut out and enlarged to the image's size."""
    rotation: Angle = 0.35
    """Greatest angle, in radians; of a volume in each of its three planes."""
    brightness: Strength = 0.1
    """Intensities are multiplied by 1 plus or minus at most this."""
    contrast: Strength = 0.1
    """The same of their differences to the image's mean."""
    gamma: Strength = 0.1
    """Greatest logarithm of the exponent of intensities, either way."""
    blur: Fraction = 0.5
    """Greatest share of a blurred image (Gaussian, standard deviation 1 voxel) in the image."""
    noise: Strength = 0.01
    """Greatest standard deviation of Gaussian noise; intensities lie in [0, 1]."""
    streams: dict[str, StreamAugmentConfig] = Field(default_factory=dict)
    """Differences by stream."""

    @model_validator(mode="after")
    def _crops_are_in_order(self) -> Self:
        for key, crop in {
            "": self.crop,
            **{f"{toml_key('streams', name)}.": own.crop for name, own in self.streams.items()},
        }.items():
            if crop and crop[0] > crop[1]:
                raise ValueError(f"{key}crop: least share {crop[0]:g} is above the greatest, {crop[1]:g}")
        return self

    def of_stream(self, name: str) -> Strengths:
        """The strengths of one stream."""
        own, modality = self.streams.get(name, StreamAugmentConfig()), parse_stream(name)[1]
        usual = {key: getattr(self, key) for key in type(self).model_fields if key != "streams"}
        usual |= {"flips": _FLIPS.get(modality, ()), "bias_field": _MR_BIAS_FIELD * (modality is Modality.MR)}
        return Strengths(**usual | own.model_dump(exclude_none=True))

    def check_stream(self, name: str, stream: StreamConfig) -> None:
        """Raises ValueError if a stream's images lack an axis along which they should be flipped."""
        axes = axis_names(stream)
        for axis in self.streams.get(name, StreamAugmentConfig()).flips or ():
            if axis not in axes:
                key = toml_key("augment", "streams", name, "flips")
                raise ValueError(f"{key}: found {axis!r}, expected some of {', '.join(axes)}")


def axis_names(stream: StreamConfig) -> tuple[Axis, ...]:
    """Names of the axes of a stream's images, in their order."""
    return ("R", "A", "S") if stream.is_volume else ("height", "width")
