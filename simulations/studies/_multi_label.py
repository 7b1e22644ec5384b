"""Supervised baseline: a network of a run and one logit per label, trained from scratch on labelled images.

Binary cross-entropy, mean over the labels that are known of a batch; optimiser, schedule and batches are those of the
run. Of the states after each twentieth of the steps the one with the best mean AUC on validation patients is kept.

Shape legend: N patients, L labels.
"""

from copy import deepcopy
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from panfm.config import RunConfig
from panfm.data.store import Batch, ImageStore
from panfm.evaluate.embed import embed_store
from panfm.evaluate.linear_probe import auc_per_label
from panfm.evaluate.scores import Floats
from panfm.models import PanModel, build_model
from panfm.seeds import numpy_generator
from panfm.training.draw_order import batches
from panfm.training.schedules import warmup_cosine
from panfm.training.training_state import build_optimiser

_CHECKS = 20


@dataclass(frozen=True)
class LabelledImages:
    """Images of some patients and their labels."""

    store: ImageStore
    labels: Floats
    """[N, L] of 0, 1 or NaN (unknown)."""


@dataclass(frozen=True)
class MultiLabelClassifier:
    """A trained network and its head."""

    model: PanModel
    head: nn.Linear

    @classmethod
    def train(cls, run: RunConfig, train: LabelledImages, validation: LabelledImages, *, steps: int) -> Self:
        """Train from scratch, and keep the state that is best on the validation patients."""
        model = build_model(run)
        head = nn.Linear(model.embedding_size, train.labels.shape[1])
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
        model.heads.add_module("labels", head)
        best, kept, classifier = -np.inf, model.state_dict(), cls(model, head)
        optimiser, labels = build_optimiser(model, run.train), torch.from_numpy(train.labels).float()
        drawn = batches(
            np.arange(len(train.labels)), run.train.batch_size, numpy_generator(run.seed, "supervised", "order")
        )
        for step in range(steps):
            subjects = next(drawn)
            rate = run.train.learning_rate * warmup_cosine((step + 0.5) / steps, warmup=run.train.warmup)
            for group in optimiser.param_groups:
                group["lr"] = rate * group["scale"]
            loss = label_loss(classifier.embed(train.store.batch(subjects)), labels[subjects])
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), run.train.clip_norm)
            optimiser.step()
            if (step + 1) % max(1, steps // _CHECKS) == 0:
                auc = classifier._auc(validation)
                if auc > best:
                    best, kept = auc, deepcopy(model.state_dict())
                model.train()
        model.load_state_dict(kept)
        return classifier

    def eval(self) -> object:
        """Go to inference mode."""
        return self.model.eval()

    def embed(self, batch: Batch) -> Tensor:
        """Logits [B, L]."""
        logits: Tensor = self.head(self.model.embed(batch))
        return logits

    def scores(self, store: ImageStore, streams: tuple[str, ...] | None = None) -> NDArray[np.float64]:
        """Logits [N, L] of all patients of a store, from all streams or only those named."""
        return embed_store(self, store, np.arange(len(store.subjects)), streams).astype(np.float64)

    def _auc(self, patients: LabelledImages) -> float:
        once = np.ones((1, len(patients.labels)))
        aucs = auc_per_label(self.scores(patients.store), patients.labels, once)
        return float(aucs[np.isfinite(aucs)].mean()) if np.isfinite(aucs).any() else -np.inf


def label_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean binary cross-entropy over the labels [B, L] that are known; 0 if none is."""
    known = torch.isfinite(labels)
    losses = functional.binary_cross_entropy_with_logits(logits, labels.nan_to_num(), reduction="none")
    return (losses * known).sum() / known.sum().clamp_min(1)
