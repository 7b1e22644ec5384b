"""`[streams.<name>]`: how the images of a stream are brought to one size and cut into tokens."""

from collections.abc import Iterator, Mapping
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from panfm.config.base import Uncoupled

Voxels = Annotated[int, Field(gt=0, le=65_536)]
Centre = Annotated[float, Field(ge=-1e3, le=1e3)]
Scale = Annotated[float, Field(ge=1e-3, le=1e6)]
GreyLevel = Annotated[float, Field(ge=-32_768, le=65_535)]
Millimetres = Annotated[float, Field(ge=1e-3, le=1e3)]


class StreamConfig(Uncoupled):
    """Size to which the images of one stream are brought, and of the patches into which they are cut."""

    habits: ClassVar[Mapping[str, str]] = {
        "size": '"auto" is for `panfm simulate`, which asks the images; `panfm plan` writes shape and patch for all'
    }
    shape: Annotated[tuple[Voxels, ...], Field(strict=False, min_length=2, max_length=3)]
    """Voxels after resampling and crop/pad: [R, A, S] for a volume, [height, width] for an image."""
    patch: Annotated[tuple[Voxels, ...], Field(strict=False, min_length=2, max_length=3)]
    """Voxels of one token, one number per axis; divides `shape`."""
    spacing_mm: Annotated[tuple[Millimetres, ...], Field(strict=False, max_length=3)] = ()
    """Voxel size in mm on each axis of a volume; left out for 2D images, which are resized to `shape`."""
    slices: Literal["R", "A", "S"] | None = None
    """Axis of a volume along which it is read as slices: patches are one slice deep, so that weights of a 2D model read
    a slice as they read a picture, and `spacing-mm` along the axis is the distance of the slices, whose surroundings
    are not smoothed into them. Left out, patches are blocks."""
    channels: Literal[1, 3] = 1
    """1 for grey, 3 for colour (2D only)."""
    nan: Literal["zero"] | None = None
    """`zero`: a volume's NaN are background, as after brain extraction, and come out as 0. Left out, an image with NaN
    is refused."""
    window: Annotated[tuple[GreyLevel, GreyLevel], Field(strict=False)] | None = None
    """Of pictures with 16-bit grey: levels shown as 0 and as 1, e.g. [0, 4095]. Left out, the 1st and 99th percentile
    of each picture's own pixels."""
    input_centre: Annotated[tuple[Centre, ...], Field(strict=False, min_length=1, max_length=18)] | None = None
    """What the tokenizer takes from its inputs before it multiplies them by `input-scale`: of the patch tokenizer one
    number per channel; of the statistics tokenizer the means, then the log standard deviations, then the gradients of
    all channels (of the texture tokenizer: four logarithms of mean differences). Constants of the run, known to
    everybody; `python -m simulations inputs` computes them from a cohort, `input-constants` from the sites' sums.
    Left out, inputs are as they are (patch), or centred and scaled alike in all streams (statistics)."""
    input_scale: Annotated[tuple[Scale, ...], Field(strict=False, min_length=1, max_length=18)] | None = None
    """Factors of the centred inputs, in the same order."""
    input_constants: Literal["summed"] | None = None
    """`summed`: `input-centre` and `input-scale` are computed before round 1, from sums over the training images of all
    sites whose operators let them leave (`input-sums` in `limits.may-leave`), and written into the run's description.
    Each input then has mean 0 and standard deviation 1 over these images. Left out, both are as written here."""

    @model_validator(mode="after")
    def _axes_agree(self) -> Self:
        if len(self.patch) != len(self.shape):
            raise ValueError(f"patch has {len(self.patch)} axes, shape has {len(self.shape)}")
        if any(size % step for size, step in zip(self.shape, self.patch, strict=True)):
            nearest = [_nearest_divisor(size, step) for size, step in zip(self.shape, self.patch, strict=True)]
            raise ValueError(f"patch {list(self.patch)} does not divide shape {list(self.shape)}, {nearest} does")
        if self.is_volume and len(self.spacing_mm) != 3:
            raise ValueError("spacing-mm: a volume needs three numbers, in mm")
        if self.is_volume and self.channels != 1:
            raise ValueError("channels: a volume has one channel")
        if not self.is_volume and self.spacing_mm:
            raise ValueError("spacing-mm: only for volumes")
        if self.slices and not self.is_volume:
            raise ValueError("slices: only for volumes")
        if self.slices and self.patch["RAS".index(self.slices)] != 1:
            deep = self.patch["RAS".index(self.slices)]
            raise ValueError(f"patch: {deep} voxels along {self.slices}, slices along this axis need 1")
        if self.nan and not self.is_volume:
            raise ValueError("nan: only for volumes")
        if self.window and (self.is_volume or not self.window[0] < self.window[1]):
            raise ValueError("window: only for 2D images, the lower grey level first")
        if (self.input_centre is None) != (self.input_scale is None):
            raise ValueError("input-centre and input-scale: expected both or neither")
        return self

    def couplings(self) -> Iterator[str]:
        """Yield what lets sums over patients out of a private run without noise."""
        if self.input_constants:
            yield "input-constants: inputs are summed over patients without noise, write input-centre and input-scale"

    @property
    def lacks_constants(self) -> bool:
        """Whether `input-centre` and `input-scale` are still to be computed from the sites' sums."""
        return self.input_constants is not None and self.input_centre is None

    @property
    def is_volume(self) -> bool:
        """Whether the images are volumes, with three axes in mm."""
        return len(self.shape) == 3

    @property
    def grid(self) -> tuple[int, ...]:
        """Number of tokens along each axis."""
        return tuple(size // step for size, step in zip(self.shape, self.patch, strict=True))


def _nearest_divisor(size: int, wanted: int) -> int:
    return min((number for number in range(1, size + 1) if size % number == 0), key=lambda number: abs(number - wanted))
