"""Poolings: from the encoded tokens of a batch to one embedding per patient.

    cls                CLS after the last norm                                              [D]
    mean               mean of all tokens after the last norm                               [D]
    cls+mean           CLS, mean of all tokens                                              [2 D]
    per-stream         CLS, mean of the tokens of every stream of the model                 [(1 + S) D]
    layers             of every chosen block, normalised: CLS, mean and sd of all tokens    [3 K D]
    per-stream-layers  the same: CLS, mean and sd of the tokens of every stream             [(1 + 2 S) K D]

A stream that a patient lacks has means and deviations of zero (a flag of its presence beside them changed no probe by
more than .0003); a patient without any token has zeros beside CLS. Outputs of blocks
are normalised without parameters (layer norm): the last norm's own scale and shift would cancel where probes
standardise, and tokens of unlike length then count alike.

Shape legend: B subjects, N tokens of the fullest subject, S streams of the model, K chosen blocks, D width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from panfm.config.features import FeaturesConfig
from panfm.errors import ConfigError
from panfm.models.backbone import Encoded


def check_layers(features: FeaturesConfig, depth: int) -> None:
    """Raise ConfigError if the pooling reads a block that the model does not have."""
    if features.layers and features.layers[-1] > depth:
        raise ConfigError(f"features.layers: found block {features.layers[-1]}, expected 1 to {depth}")


def embedding_size(features: FeaturesConfig, *, width: int, streams: int, depth: int) -> int:
    """Count the numbers of one embedding."""
    if features.reads_blocks:
        per_block = 3 if features.pooling == "layers" else 1 + 2 * streams
        return per_block * len(features.layers or range(depth)) * width
    return {"cls": 1, "mean": 1, "cls+mean": 2, "per-stream": 1 + streams}[features.pooling] * width


def pool(encoded: Encoded, features: FeaturesConfig, stream_of_token: Tensor, streams: int) -> Tensor:
    """Pool a batch to embeddings [B, E].

    Guarantees:
        padding: what padded rows hold changes nothing, not even if it is NaN.
    Args:
        encoded: With the outputs of its blocks, where the pooling reads them.
        stream_of_token: int64 [B, N], the stream of each token, index into the model's streams.
        streams: Number of the model's streams.
    Raises:
        ConfigError: the pooling reads blocks, and the backbone tells no CLS of them.
    """
    valid = encoded.layout.valid

    def of_streams() -> list[Tensor]:
        return [valid & (stream_of_token == stream) for stream in range(streams)]

    match features.pooling:
        case "cls":
            return encoded.cls
        case "mean":
            return _mean(encoded.tokens, valid)
        case "cls+mean":
            return cls_and_mean(encoded)
        case "per-stream":
            return torch.cat([encoded.cls, *(_mean(encoded.tokens, chosen) for chosen in of_streams())], dim=1)
        case "layers":
            return _pool_layers(encoded, features, [valid])
        case "per-stream-layers":
            return _pool_layers(encoded, features, of_streams())


def cls_and_mean(encoded: Encoded) -> Tensor:
    """CLS token and mean of the tokens of each subject [B, 2 D]; the mean of no token is 0."""
    return torch.cat([encoded.cls, _mean(encoded.tokens, encoded.layout.valid)], dim=1)


def _pool_layers(encoded: Encoded, features: FeaturesConfig, sets: Sequence[Tensor]) -> Tensor:
    """Pool the tokens of each set, bool [B, N], block by block."""
    if not encoded.blocks or len(encoded.block_cls) != len(encoded.blocks):
        expected = 'expected "cls", "mean", "cls+mean" or "per-stream"'
        raise ConfigError(f"features.pooling: the backbone tells no CLS of its blocks, {expected}")
    parts = []
    for layer in features.layers or range(1, len(encoded.blocks) + 1):
        tokens = functional.layer_norm(encoded.blocks[layer - 1], encoded.cls.shape[1:], eps=1e-6)
        parts.append(functional.layer_norm(encoded.block_cls[layer - 1], encoded.cls.shape[1:], eps=1e-6))
        for chosen in sets:
            mean = _mean(tokens, chosen)
            parts += [mean, _mean((tokens - mean[:, None]).square(), chosen).sqrt()]
    return torch.cat(parts, dim=1)


def _mean(tokens: Tensor, chosen: Tensor) -> Tensor:
    """Mean [B, D] of chosen tokens, bool [B, N]; zeros where none is chosen."""
    total = tokens.masked_fill(~chosen[:, :, None], 0.0).sum(dim=1)
    return total / chosen.sum(dim=1, keepdim=True).clamp_min(1)
