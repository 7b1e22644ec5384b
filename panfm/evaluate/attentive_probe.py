"""Attentive probe: learned queries attend to the tokens of a frozen model; a linear layer predicts from what they read.

Shape legend: N subjects to fit on, M subjects to predict, B of a batch, T tokens, D width, H queries.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from panfm.data.store import Batch
from panfm.evaluate.label_prediction import Prediction, cannot_fit
from panfm.evaluate.scores import Floats
from panfm.models import PanModel
from panfm.seeds import numpy_generator

_QUERIES = 4
_STEPS, _BATCH_SIZE, _VALIDATE_EVERY = 300, 64, 20
_LEARNING_RATE, _WEIGHT_DECAY = 3e-3, 0.1
_ONE_OF = 5
"""One subject of so many validates."""


class TokenReader:
    """Reads the tokens of all patches as the features of a subject; each token has mean 0 and deviation 1."""

    def __init__(self, model: PanModel) -> None:
        self.model = model

    def eval(self) -> object:
        """Go to inference mode."""
        return self.model.eval()

    def embed(self, batch: Batch) -> Tensor:
        """Tokens [B, T, 1 + D] of all patches of the model: 1 and the token, or zeros if a subject lacks it."""
        model = self.model
        encoded = model.encode(model.patch_features(batch.to(model.stream_of_patch.device)))
        tokens = functional.layer_norm(encoded.tokens, (model.width,)).float()
        whole = tokens.new_zeros(batch.size, len(model.stream_of_patch), 1 + model.width)
        subject, place = torch.nonzero(encoded.layout.valid, as_tuple=True)
        patch = encoded.layout.patch_index[subject, place]
        whole[subject, patch] = functional.pad(tokens[subject, place], (1, 0), value=1.0)
        return whole


class _Attention(nn.Module):
    """Queries and the linear layer that reads what they attend to; all start at 0, at the mean of the tokens."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.queries = nn.Linear(width, _QUERIES)
        self.linear = nn.Linear(_QUERIES * width, 1)
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def forward(self, tokens: Tensor) -> Tensor:
        """Predict [B] from tokens [B, T, 1 + D], of which the first number says whether they are there."""
        is_there, values = tokens[..., :1] > 0.0, tokens[..., 1:]
        shares = self.queries(values).masked_fill(~is_there, -torch.inf).softmax(dim=1)
        predicted: Tensor = self.linear(torch.einsum("bth,btd->bhd", shares, values).flatten(1))[:, 0]
        return predicted


def attentive(fit: Floats, labels: Floats, test: Floats, name: str, is_number: bool) -> Prediction:
    """Predict a label by attention, trained by AdamW; of its steps the one with the least loss on a fifth of the
    subjects is kept.

    Args:
        fit: [N, T, 1 + D], as `TokenReader` reads them.
        labels: [N], NaN where unknown.
        test: [M, T, 1 + D].
        name: Of the label, for notes.
        is_number: Whether it is regressed.
    """
    known = np.isfinite(labels)
    if (notes := cannot_fit(labels[known], name, is_number)) is not None:
        return Prediction(np.full(len(test), np.nan), notes)
    tokens, asked = _standardised(fit[known], test)
    centre, scale = (labels[known].mean(), labels[known].std() or 1.0) if is_number else (0.0, 1.0)
    targets = torch.from_numpy(((labels[known] - centre) / scale).astype(np.float32))
    order = numpy_generator(0, "attentive-probe").permutation(len(targets))
    in_classes = order[np.argsort(labels[known][order], kind="stable")]  # so that both parts have all classes
    is_validation = np.arange(len(order)) % _ONE_OF == 0
    network = _train(tokens, targets, in_classes[~is_validation], in_classes[is_validation], is_number)
    with torch.inference_mode():
        scores = np.concatenate([network(part).numpy() for part in asked.split(_BATCH_SIZE)]).astype(np.float64)
    return Prediction(scores * scale + centre)


def _standardised(fit: Floats, test: Floats) -> tuple[Tensor, Tensor]:
    """Tokens with mean 0 and deviation 1 per number over all tokens of the fit."""
    own = fit[..., 1:][fit[..., 0] > 0.0]
    centre, scale = own.mean(axis=0), np.maximum(own.std(axis=0), 1e-6)
    both = []
    for tokens in (fit, test):
        values = (tokens[..., 1:] / np.maximum(tokens[..., :1], 1e-6) - centre) / scale
        both.append(torch.from_numpy(np.concatenate([tokens[..., :1], values], axis=2).astype(np.float32)))
    return both[0], both[1]


def _train(
    tokens: Tensor, targets: Tensor, train: NDArray[np.int64], validation: NDArray[np.int64], is_number: bool
) -> _Attention:
    measure = functional.mse_loss if is_number else functional.binary_cross_entropy_with_logits
    network = _Attention(tokens.shape[2] - 1)
    optimiser = torch.optim.AdamW(network.parameters(), _LEARNING_RATE, weight_decay=_WEIGHT_DECAY)
    best, kept = float("inf"), network.state_dict()
    for step in range(_STEPS + 1):
        if step % _VALIDATE_EVERY == 0:
            with torch.no_grad():
                loss = float(measure(network(tokens[validation]), targets[validation]))
            if loss < best:
                best, kept = loss, {name: value.clone() for name, value in network.state_dict().items()}
        chosen = numpy_generator(0, "attentive-probe", step).permutation(train)[:_BATCH_SIZE]
        optimiser.zero_grad()
        measure(network(tokens[chosen]), targets[chosen]).backward()
        optimiser.step()
    network.load_state_dict(kept)
    return network
