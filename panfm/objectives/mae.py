"""Masked autoencoding: reconstruct the normalised content of hidden patches.

    target  patch of the stem's map, minus its mean, over its standard deviation
    loss    mean over hidden places of the mean squared error

With the `patch` tokenizer the map is the image itself, as in the paper; with `statistics` it is the block statistics
that the tokenizer reads.

Source: MAE (He et al. 2022), normalised-pixel target.
Shape legend: B subjects, K hidden places, P subjects that hold a stream, T places of a stream, F features of a patch.
"""

import torch
from torch import Tensor

from panfm.models import PanModel
from panfm.models.backbone import Encoded
from panfm.models.pan import StreamTokenizer
from panfm.models.stems import patchify
from panfm.objectives.objective import View


class MaeObjective:
    """Mean squared error of normalised patches; keeps no state and needs no teacher."""

    needs_teacher = False

    def loss(self, student: PanModel, teacher: PanModel, view: View, full: Encoded | None) -> Tensor:
        """Loss of each subject [B]."""
        total = view.guesses.new_zeros(view.maps.size, dtype=torch.float32)
        stream = student.stream_of_place[view.hidden.place]
        for index, (name, head) in enumerate(zip(student.stream_names, student.heads.stream_heads(), strict=True)):
            subject, column = torch.nonzero((stream == index) & view.hidden.valid, as_tuple=True)
            if len(subject):
                assert head.decode is not None
                target = self._patches(student, view, name, subject, view.hidden.place[subject, column])
                error = (head.decode(view.guesses[subject, column]).float() - target).square().mean(dim=-1)
                total = total.index_add(0, subject, error)
        return total / view.hidden.valid.sum(dim=1).clamp_min(1)

    def _patches(self, student: PanModel, view: View, name: str, subject: Tensor, place: Tensor) -> Tensor:
        """Normalised patches [n, F] of one stream at places of subjects."""
        tokenizer = student.streams[name]
        assert isinstance(tokenizer, StreamTokenizer)
        patches = patchify(view.maps.images[name], tokenizer.step)
        row = torch.searchsorted(view.maps.rows[name], subject)
        first = int((student.stream_of_place < student.stream_names.index(name)).sum())
        chosen = patches[row, place - first]
        centred = chosen - chosen.mean(dim=-1, keepdim=True)
        return centred / (centred.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt()

    def state(self) -> dict[str, Tensor]:
        """Nothing."""
        return {}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Nothing to take back."""
