"""Public weights fitted to a run: patch embeddings and positions of every stream, from those of one RGB grid.

    patch      a kernel of another patch size is resized so that it answers to an image that is resized alike as the old
               one did to the image (FlexiViT's pseudo-inverse, Beyer et al. 2023)
    pixels     the family's mean and deviation become part of kernel and bias, since our pixels lie in [0, 1]
    grey       the kernel is summed over its channels: a grey image answers as the same image in three channels
    volumes    the kernel stands in the plane across `start.inflate-axis`, spread over the depth or in its middle; of
               streams with `slices` it stands across that axis, as it is
    positions  bicubic from the public grid to the stream's, as the family's own code does it; along the depth the same

Shape legend: D width, C channels, P patch of the kernel, Q patch of the stream, T patches of the stream.
"""

import torch
from torch import Tensor
from torch.nn import functional

from panfm.anatomy import module_name
from panfm.config import RunConfig, StreamConfig
from panfm.config.start import StartConfig
from panfm.errors import DataError
from panfm.models.public_weights import HALF, IMAGENET, NONE, MeanStd, PublicWeights
from panfm.texts import toml_key

_DECLARED = {"imagenet": IMAGENET, "half": HALF, "none": NONE}
_AXES = "RAS"


def check_public_fit(run: RunConfig, public: PublicWeights) -> None:
    """Check that a run's model is the one of public weights.

    Raises:
        DataError: one line that says which fields of the run to set to what.
    """
    assert run.start is not None
    model = run.model.model_dump(mode="json", by_alias=True)
    remedies = [
        f"model.{key} = {toml_value(value)}" for key, value in public.model_fields().items() if model[key] != value
    ]
    if run.start.normalisation == "family" and public.normalisation is None:
        remedies.append('start.normalisation = "imagenet", "half" or "none", as these weights were trained')
    volumes = [name for name, stream in run.streams.items() if stream.is_volume and not stream.slices]
    if run.start.inflate is None and volumes:
        remedies.append(f'start.inflate = "mean" or "centre", or {toml_key("streams", volumes[0], "slices")}')
    for keys, scaled in (
        ("input-centre and input-scale", [name for name, stream in run.streams.items() if stream.input_centre]),
        ("input-constants", [name for name, stream in run.streams.items() if stream.lacks_constants]),
    ):
        if scaled:
            remedies.append(f"no {keys} of {', '.join(scaled)}: the patch embedding standardises pixels")
    if remedies:
        raise DataError(f"start.model: {public.family} weights fit another run, set {', '.join(remedies)}")


def toml_value(value: object) -> str:
    """A text, number or truth as TOML writes it."""
    return f'"{value}"' if isinstance(value, str) else str(value).lower()


def dense_state(run: RunConfig, public: PublicWeights) -> dict[str, Tensor]:
    """Parameters of a run's dense model that public weights give: the backbone, and all of its tokenizers."""
    assert run.start is not None
    state = dict(public.backbone)
    for name, stream in run.streams.items():
        kernel, bias = stream_kernel(stream, run.start, public)
        tokenizer = f"streams.{module_name(name)}"
        state |= {
            f"{tokenizer}.project.weight": kernel.flatten(1),
            f"{tokenizer}.project.bias": bias,
            f"{tokenizer}.embedding": torch.zeros(public.width),
        }
        if public.positions is not None:
            state[f"{tokenizer}.position"] = stream_positions(stream, run.start, public)
    return state


def stream_kernel(stream: StreamConfig, start: StartConfig, public: PublicWeights) -> tuple[Tensor, Tensor]:
    """Patch embedding of one stream: kernel [D, C, *Q] and bias [D], for pixels in [0, 1].

    Raises:
        DataError: the public kernel reads another number of channels.
    """
    mean, deviation = _mean_std(start, public)
    channels = public.kernel.shape[1]
    if len(mean) != channels or stream.channels not in (1, channels):
        raise DataError(f"start.model: the patch embedding reads {channels} channels, expected {len(mean)}")
    kernel = resized_kernel(public.kernel.double(), _in_plane(stream.patch, stream, start))
    kernel = kernel / torch.tensor(deviation, dtype=torch.float64)[:, None, None]
    bias = public.bias.double() - torch.einsum("dchw,c->d", kernel, torch.tensor(mean, dtype=torch.float64))
    if stream.channels == 1:
        kernel = kernel.sum(dim=1, keepdim=True)
    if stream.is_volume:
        kernel = _inflated(kernel, stream, start)
    return kernel.float(), bias.float()


def stream_positions(stream: StreamConfig, start: StartConfig, public: PublicWeights) -> Tensor:
    """Learned positions of one stream's patches [T, D], row-major."""
    assert public.positions is not None
    grid, side = _in_plane(stream.grid, stream, start), int(len(public.positions) ** 0.5)
    table = public.positions.unflatten(0, (side, side))
    if grid != (side, side):
        moved = table.permute(2, 0, 1)[None]
        moved = functional.interpolate(moved, grid, mode="bicubic", align_corners=False, antialias=public.antialias)
        table = moved[0].permute(1, 2, 0)
    if stream.is_volume:
        depth = _depth(stream, start)
        sizes = [-1] * 4
        sizes[depth] = stream.grid[depth]
        table = table.unsqueeze(depth).expand(sizes)
    return table.reshape(-1, public.width)


def resized_kernel(kernel: Tensor, patch: tuple[int, ...]) -> Tensor:
    """Resize a kernel [D, C, P, P] to [D, C, *patch]: w' = pinv(B') w, where B resizes an image of P x P bilinearly.

    Guarantees:
        larger: with a patch at least as large, w' answers to B x as w does to x.
    """
    old = kernel.shape[2:]
    if tuple(old) == patch:
        return kernel
    pixels = torch.eye(old.numel(), dtype=kernel.dtype).view(-1, 1, *old)
    resize = functional.interpolate(pixels, patch, mode="bilinear", align_corners=False, antialias=True).flatten(1)
    return (kernel.flatten(2) @ torch.linalg.pinv(resize).T).unflatten(2, patch)


def _inflated(kernel: Tensor, stream: StreamConfig, start: StartConfig) -> Tensor:
    """Put a kernel [D, 1, Q, Q] into volumes: [D, 1, Q, Q, Q]."""
    axis = _depth(stream, start)
    depth = stream.patch[axis]
    if start.inflate == "mean":
        share = torch.full((depth,), 1.0 / depth, dtype=kernel.dtype)
    else:
        share = functional.one_hot(torch.tensor(depth // 2), depth).to(kernel.dtype)
    return (kernel[..., None] * share).movedim(-1, 2 + axis)


def _depth(stream: StreamConfig, start: StartConfig) -> int:
    """Axis of a volume that is the depth, 0 to 2."""
    return _AXES.index(stream.slices or start.inflate_axis)


def _in_plane(sizes: tuple[int, ...], stream: StreamConfig, start: StartConfig) -> tuple[int, ...]:
    """The two sizes of an image, or of a volume's plane across the depth."""
    depth = _depth(stream, start)
    return sizes if len(sizes) == 2 else (*sizes[:depth], *sizes[depth + 1 :])


def _mean_std(start: StartConfig, public: PublicWeights) -> MeanStd:
    declared = _DECLARED.get(start.normalisation, public.normalisation)
    assert declared is not None
    return declared
