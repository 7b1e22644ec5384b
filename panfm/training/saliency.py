"""Saliency of the streams: the shares of the CLS token's attention that they receive.

The backbone gives a share per token (`attention`: CLS row of the last block; `value`: attention times the norm of the
centred values, all blocks). Here they are summed per stream, and kept as a running profile of the site.

Shape legend: B subjects, N patches, S streams.
"""

import torch
from torch import Tensor

from panfm.models.batch_sums import batch_sum
from panfm.models.tokens import Layout


def stream_shares(token_shares: Tensor, layout: Layout, stream_of_patch: Tensor, num_streams: int) -> Tensor:
    """Sum token shares [B, N] per stream -> [B, S]; absent streams get 0, every row sums to 1."""
    stream = stream_of_patch[layout.patch_index]
    return token_shares.new_zeros(len(token_shares), num_streams).scatter_add_(
        1, stream, token_shares * layout.valid.to(token_shares.dtype)
    )


def streams_present(layout: Layout, stream_of_patch: Tensor, num_streams: int) -> Tensor:
    """Which streams each subject has, bool [B, S]."""
    stream = stream_of_patch[layout.patch_index]
    count = torch.zeros(len(stream), num_streams, dtype=torch.long, device=stream.device)
    return count.scatter_add_(1, stream, layout.valid.long()) > 0


def relative_profile(shares: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
    """Mean saliency of each stream relative to an equal split, over the subjects that have it.

    A subject with n streams that leans on all alike gives 1 for each, so profiles of subjects with different streams
    can be averaged.

    Args:
        shares: [B, S], 0 where absent.
        present: bool [B, S].
    Returns:
        Mean of share x n [S] (1 where no subject has the stream) and the number of subjects that have it [S].
    """
    relative = shares * present.sum(dim=1, keepdim=True)
    count = batch_sum(present.sum(dim=0))
    mean = batch_sum(relative.sum(dim=0)) / count.clamp_min(1)
    return torch.where(count > 0, mean, torch.ones_like(mean)), count


def normalised_entropy(relative: Tensor) -> Tensor:
    """Entropy of shares over the streams present [..., 1], as a share of its maximum; 1 where fewer than two are.

    Args:
        relative: [..., S], any positive multiple of the shares; 0 where absent.
    """
    share = relative / relative.sum(dim=-1, keepdim=True).clamp_min(1e-12)
    entropy = torch.special.entr(share).sum(dim=-1, keepdim=True)
    count = (relative > 0).sum(dim=-1, keepdim=True)
    return torch.where(count > 1, entropy / count.clamp_min(2).log(), torch.ones_like(entropy))
