"""Masked autoencoding: reconstruct the normalised content of hidden patches.

    target  patch of the patch features, minus its mean, over its standard deviation
    loss    mean over hidden patches of the mean squared error

With the `patch` tokenizer these are the voxels themselves, as in the paper; with `statistics` they are the block
statistics that the tokenizer reads.

Source: MAE (He et al. 2022), normalised-pixel target.
Shape legend: B subjects, K hidden patches, P subjects that hold a stream, F features of a patch.
"""

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn

from panfm.anatomy import module_name
from panfm.data.store import Batch, send
from panfm.models import PanModel
from panfm.models.backbone import Encoded
from panfm.models.heads import ObjectiveHeads
from panfm.models.pan import StreamTokenizer
from panfm.models.patch_features import patchify
from panfm.models.tokens import gather_tokens
from panfm.training.objectives.interface import Objective, StudentOutput, Targets
from panfm.training.objectives.mae.config import MaeConfig
from panfm.training.token_mask import TokenMask


class MaeObjective(Objective):
    """Mean squared error of normalised patches; keeps no state and needs no teacher."""

    needs_teacher = False

    def __init__(self, config: MaeConfig, model: PanModel, seed: int) -> None:
        """Start; there are no options and no statistics to keep."""

    @staticmethod
    def build_heads(config: MaeConfig, width: int, num_features: Mapping[str, int]) -> ObjectiveHeads:
        """Make a decoder of patches for each stream."""
        decoders = {name: {"decode": nn.Linear(width, size)} for name, size in num_features.items()}
        return ObjectiveHeads(per_stream=decoders)

    @torch.no_grad()
    def targets(self, teacher: PanModel, features: Batch, mask: TokenMask, full: Encoded | None) -> Targets:
        """Per stream with something hidden: `patches/<stream>` [P, W, F], normalised; `column/<stream>` [P, W], where
        among the hidden patches each stands; `valid/<stream>` [P, W]. W is the most that one subject hides of it, or,
        on a device that would have to be asked, the most that one could."""
        targets = {}
        stream = teacher.stream_of_patch[mask.hidden.patch_index]
        for index, (name, rows) in enumerate((name, features.rows.get(name)) for name in teacher.stream_names):
            if rows is None:
                continue
            patches, rows = teacher.patches_of[name], send(rows, stream.device)
            most = min(stream.shape[1], patches.stop - patches.start)
            hidden, column = mask.hidden.select(stream == index, width=None if stream.device.type == "cpu" else most)
            if column.shape[1]:
                targets["patches/" + name] = _patches(teacher, features, name, hidden.patch_index[rows])
                targets["column/" + name] = column[rows]
                targets["valid/" + name] = hidden.valid[rows]
        return targets

    def loss(self, student: PanModel, output: StudentOutput, targets: Targets) -> Tensor:
        """Loss of each subject [B]."""
        total = output.predictions.new_zeros(output.features.size).float()
        for name, head in zip(student.stream_names, student.heads.stream_heads(), strict=True):
            if "patches/" + name in targets:
                rows = send(output.features.rows[name], total.device)
                patches = cast(nn.Linear, head.decode)(
                    gather_tokens(output.predictions[rows], targets["column/" + name])
                )
                error = (patches.float() - targets["patches/" + name]).square().mean(dim=-1)
                error = torch.where(targets["valid/" + name], error, torch.zeros_like(error)).sum(dim=1)
                total = total.index_add(0, rows, error)
        return total / output.mask.hidden.valid.sum(dim=1).clamp_min(1)


def _patches(model: PanModel, features: Batch, name: str, patch_index: Tensor) -> Tensor:
    """Normalised patches [P, W, F] of one stream at indices [P, W] into the vocabulary."""
    tokenizer = model.streams[module_name(name)]
    assert isinstance(tokenizer, StreamTokenizer)
    places = (patch_index - model.patches_of[name].start).clamp_min(0)
    chosen = gather_tokens(patchify(features.images[name], tokenizer.step), places)
    centred = chosen - chosen.mean(dim=-1, keepdim=True)
    return centred / (centred.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt()
