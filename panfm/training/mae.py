"""Masked autoencoding: reconstruct the normalised content of hidden patches.

    target  patch of the stem's map, minus its mean, over its standard deviation
    loss    mean over hidden places of the mean squared error

With the `patch` tokenizer the map is the image itself, as in the paper; with `statistics` it is the block statistics
that the tokenizer reads.

Source: MAE (He et al. 2022), normalised-pixel target.
Shape legend: B subjects, K hidden places, P subjects that hold a stream, F features of a patch.
"""

import torch
from torch import Tensor

from panfm.data.store import Batch
from panfm.models import PanModel
from panfm.models.backbone import Encoded
from panfm.models.pan import StreamTokenizer
from panfm.models.stems import patchify
from panfm.models.tokens import gather_tokens
from panfm.training.objective import Split, Targets, View


class MaeObjective:
    """Mean squared error of normalised patches; keeps no state and needs no teacher."""

    needs_teacher = False

    @torch.no_grad()
    def targets(self, teacher: PanModel, maps: Batch, split: Split, full: Encoded | None) -> Targets:
        """Per stream with something hidden: `patches/<stream>` [P, W, F], normalised; `column/<stream>` [P, W], where
        among the hidden places each stands; `valid/<stream>` [P, W]. W is the most that one subject hides of it."""
        found = {}
        stream = teacher.stream_of_place[split.hidden.place]
        for index, (name, rows) in enumerate((name, maps.rows.get(name)) for name in teacher.stream_names):
            if rows is None:
                continue
            places, column = split.hidden.select(stream == index)
            if column.shape[1]:
                found["patches/" + name] = _patches(teacher, maps, name, places.place[rows])
                found["column/" + name] = column[rows]
                found["valid/" + name] = places.valid[rows]
        return found

    def loss(self, student: PanModel, view: View, targets: Targets) -> Tensor:
        """Loss of each subject [B]."""
        total = view.guesses.new_zeros(view.maps.size, dtype=torch.float32)
        for name, head in zip(student.stream_names, student.heads.stream_heads(), strict=True):
            if "patches/" + name in targets:
                assert head.decode is not None
                rows = view.maps.rows[name]
                guesses = head.decode(gather_tokens(view.guesses[rows], targets["column/" + name]))
                error = (guesses.float() - targets["patches/" + name]).square().mean(dim=-1)
                error = torch.where(targets["valid/" + name], error, torch.zeros_like(error)).sum(dim=1)
                total = total.index_add(0, rows, error)
        return total / view.split.hidden.valid.sum(dim=1).clamp_min(1)

    def state(self) -> dict[str, Tensor]:
        """Nothing."""
        return {}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Nothing to take back."""


def _patches(model: PanModel, maps: Batch, name: str, place: Tensor) -> Tensor:
    """Normalised patches [P, W, F] of one stream at places [P, W] of the vocabulary."""
    tokenizer = model.streams[name]
    assert isinstance(tokenizer, StreamTokenizer)
    first = int((model.stream_of_place < model.stream_names.index(name)).sum())
    chosen = gather_tokens(patchify(maps.images[name], tokenizer.step), (place - first).clamp_min(0))
    centred = chosen - chosen.mean(dim=-1, keepdim=True)
    return centred / (centred.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt()
