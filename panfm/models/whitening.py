"""Within-image whitening: a linear map by which what changes from a crop of an image to the whole counts for less.

    embedding -> mean over the patient's streams s of ((embedding - centre_s) / scale_s) @ matrix_s

It belongs to one model under one pooling: `whitening.safetensors` beside the weights, known to `metadata.json` by its
SHA-256 (`whitening`). How it is fitted: panfm/evaluate/fit_whitening.py.

Shape legend: B subjects, S streams, E numbers of an embedding.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from panfm.errors import ConfigError, DataError, reason
from panfm.files import write_atomic
from panfm.outputs import write_json
from panfm.texts import parse_json, read_text

FILE = "whitening.safetensors"
_METADATA, _KEY = "metadata.json", "whitening"
_MAX_METADATA_BYTES = 1 << 20
_PARTS = ("centre", "scale", "matrix")


class Whitening(nn.Module):
    """The linear map of every stream. Its tensors are no parameters of the model and in no state dict.

    Guarantees:
        absent: a stream that a patient lacks changes nothing; a patient without any gets zeros.
    """

    centre: Tensor
    scale: Tensor
    matrix: Tensor

    def __init__(self, centre: Tensor, scale: Tensor, matrix: Tensor) -> None:
        """Take centre and scale [S, E] and symmetric matrices [S, E, E] of the model's streams, float32."""
        super().__init__()
        for name, value in zip(_PARTS, (centre, scale, matrix), strict=True):
            self.register_buffer(name, value, persistent=False)

    def forward(self, embedding: Tensor, present: Tensor) -> Tensor:
        """Whiten embeddings [B, E] of patients who have the streams `present`, bool [B, S]."""
        shares = present.to(embedding.dtype) / present.sum(dim=1, keepdim=True).clamp_min(1)
        whitened = torch.zeros_like(embedding)
        for stream, matrix in enumerate(self.matrix):
            standard = (embedding - self.centre[stream]) / self.scale[stream]
            whitened = whitened + shares[:, stream, None] * (standard @ matrix)
        return whitened

    def only(self, streams: Sequence[int]) -> Self:
        """The maps of some of the streams, in that order."""
        at = list(streams)
        return type(self)(self.centre[at], self.scale[at], self.matrix[at])


def save_whitening(folder: Path, whitening: Whitening, pooling: str) -> str:
    """Write a whitening into a model's folder, and its hash into the metadata there; returns the hash.

    Args:
        folder: `<run folder>/model`.
        pooling: That it was fitted under, as `--pooling` says it.
    Raises:
        DataError: the folder has no metadata, or cannot be written.
    """
    metadata = _metadata(folder)
    if metadata is None:
        raise DataError(f"{folder / _METADATA}: no such file, expected the folder of a run's model")
    tensors = {name: getattr(whitening, name).contiguous() for name in _PARTS}
    content = safetensors.torch.save(tensors, metadata={"pooling": pooling})
    digest = hashlib.sha256(content).hexdigest()
    try:
        write_atomic(folder / FILE, content)
        write_json(folder / _METADATA, metadata | {_KEY: digest}, indent=2)
    except OSError as error:
        raise DataError(f"{folder}: cannot be written ({error.strerror})") from error
    return digest


def read_whitening(folder: Path, *, streams: int, size: int, pooling: str) -> Whitening | None:
    """Read the whitening of a model's folder; None if it has none.

    Args:
        streams: Of the model.
        size: Numbers of an embedding.
        pooling: That embeddings are read by.
    Raises:
        ConfigError: the whitening was fitted under another pooling.
        DataError: the file is missing, changed, or of another model.
    """
    path = folder / FILE
    expected = (_metadata(folder) or {}).get(_KEY)
    if expected is None and not path.exists():
        return None
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}), metadata.json tells of a whitening") from error
    if hashlib.sha256(content).hexdigest() != expected:
        raise DataError(f"{path}: is not the whitening that metadata.json tells of, expected SHA-256 {expected}")
    fitted, tensors = _parse(path, content)
    if fitted != pooling:
        raise ConfigError(f"{path}: was fitted under pooling {fitted}, expected {pooling}; fit it again")
    shapes = {"centre": (streams, size), "scale": (streams, size), "matrix": (streams, size, size)}
    for name, shape in shapes.items():
        if name not in tensors or tensors[name].shape != shape or not bool(tensors[name].isfinite().all()):
            raise DataError(f"{path}: {name} does not hold, expected finite numbers {list(shape)}")
    return Whitening(*(tensors[name] for name in _PARTS))


def _parse(path: Path, content: bytes) -> tuple[str, dict[str, Tensor]]:
    try:
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
        return str(header["__metadata__"]["pooling"]), safetensors.torch.load(content)
    except (ValueError, KeyError, TypeError, SafetensorError) as error:
        raise DataError(f"{path}: not a whitening ({reason(error)})") from error


def _metadata(folder: Path) -> dict[str, Any] | None:
    path = folder / _METADATA
    try:
        return parse_json(read_text(path, max_bytes=_MAX_METADATA_BYTES), str(path), max_bytes=_MAX_METADATA_BYTES)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, ConfigError) as error:
        raise DataError(f"{path}: not valid JSON ({reason(error)})") from error
