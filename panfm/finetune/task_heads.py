"""Heads of downstream tasks, which replace the heads of pre-training.

    LabelHead          standardised embedding -> linear layer: yes/no, classes, a number, or a log hazard
    SegmentationHead   tokens of the last and the middle block -> a convolutional decoder with skips from the image, in
                       the manner of UNETR (Hatamizadeh et al. 2022, arXiv 2103.10504) and U-Net

Shape legend: B subjects, P of them that have the segmented stream, E numbers of an embedding, K outputs or classes,
D width, `*grid` patches, `*shape` voxels of the stream.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from copy import deepcopy
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from panfm.config import StreamConfig
from panfm.data.store import Batch, ImageStore
from panfm.finetune.survival import cox_loss
from panfm.finetune.task_description import Kind, TaskDescription
from panfm.models import PanModel
from panfm.seeds import torch_generator
from panfm.sharing.groups import HEAD

_COARSE_CHANNELS, _FINE_CHANNELS = (32, 128), 8
"""Channels of the decoder: the coarsest level has half of the encoder's width, within the first two bounds; each finer
level has half of the level before it, at least the third number."""
_NORM_GROUPS = 4
_CLASSIFY_DEVIATION = 0.01
"""Deviation of the initial weights of a segmentation's last layer: small, so that the bias decides first outputs."""
_PENALTIES = (10.0, 1.0, 0.1, 0.01)
"""Weights of the mean square of a label head's weights, relative to the mean loss, of which validation chooses."""
_ITERATIONS = 50
_SMOOTH = 1.0
"""Added to both sides of the Dice ratio, so that a class that no voxel has counts for little."""


class TaskHead(nn.Module, ABC):
    """Predicts the outputs of a task from a batch of images, which the given model encodes."""

    sharing_group = HEAD
    rate_factor = 1.0
    """Learning rate of the head, as a multiple of that of the encoder's last layer."""

    @property
    def compares_examples(self) -> bool:
        """Whether the loss of a batch compares its examples, and so is no mean over single ones."""
        return False

    @abstractmethod
    def forward(self, model: PanModel, batch: Batch) -> Tensor:
        """Encode a batch of images and return the task's raw outputs."""

    @abstractmethod
    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Mean loss of a batch; unknown targets (NaN) are left out."""

    @abstractmethod
    def probabilities(self, outputs: Tensor) -> Tensor:
        """Turn raw outputs into probabilities; of a number into its own unit; log hazards stay as they are."""


class LabelHead(TaskHead):
    """Linear layer on an embedding that is standardised by the training patients' mean and deviation."""

    centre: Tensor
    scale: Tensor
    target_centre: Tensor
    target_scale: Tensor

    def __init__(self, kind: Kind, size: int, outputs: int) -> None:
        super().__init__()
        self.kind = kind
        self.linear = nn.Linear(size, outputs)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        for name, length in (("centre", size), ("target_centre", outputs)):
            self.register_buffer(name, torch.zeros(length))
        for name, length in (("scale", size), ("target_scale", outputs)):
            self.register_buffer(name, torch.ones(length))

    @property
    def compares_examples(self) -> bool:
        """Whether the task is survival, whose loss compares patients."""
        return self.kind == "survival"

    def standardise(self, embeddings: Tensor, targets: Tensor) -> None:
        """Set mean and deviation from embeddings [N, E] and targets [N, K] of the training patients."""
        self.centre.copy_(embeddings.mean(dim=0))
        self.scale.copy_(embeddings.std(dim=0, correction=0).clamp_min(1e-6))
        if self.kind == "number":
            known = targets[torch.isfinite(targets).all(dim=1)]
            self.target_centre.copy_(known.mean(dim=0))
            self.target_scale.copy_(known.std(dim=0, correction=0).clamp_min(1e-12))

    def fit(self, train: tuple[Tensor, Tensor], validation: tuple[Tensor, Tensor]) -> None:
        """Start as a linear probe: set the linear layer to the best of some penalised fits on frozen embeddings.

        Fine-tuning from an untrained layer distorts the encoder before the layer is of use, most so at few labels
        (Kumar et al. 2022, arXiv 2202.10054).

        Args:
            train: Embeddings [N, E] and targets [N, K], which are fitted; `standardise` has seen them.
            validation: The same of the patients whose loss decides on the penalty.
        """
        least, (embeddings, targets) = float("inf"), validation
        for penalty in _PENALTIES:
            linear = self._fitted(*train, penalty)
            with torch.no_grad():
                loss = float(self.loss(linear(self._standard(embeddings).double()), targets.double()))
            if loss < least:
                least = loss
                self.linear.load_state_dict(linear.state_dict())

    def _fitted(self, embeddings: Tensor, targets: Tensor, penalty: float) -> nn.Linear:
        """Linear layer float64 with the least mean loss plus half the penalty times its square."""
        inputs, linear = self._standard(embeddings).double(), deepcopy(self.linear).double()
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
        optimiser = torch.optim.LBFGS(linear.parameters(), max_iter=_ITERATIONS, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimiser.zero_grad()
            loss = self.loss(linear(inputs), targets.double()) + 0.5 * penalty * linear.weight.square().sum()
            loss.backward()
            return loss

        optimiser.step(closure)
        return linear

    def _standard(self, embeddings: Tensor) -> Tensor:
        return (embeddings - self.centre) / self.scale

    def forward(self, model: PanModel, batch: Batch) -> Tensor:
        """Predict logits, standardised numbers or log hazards, [B, K]."""
        outputs: Tensor = self.linear(self._standard(model.embed(batch)))
        return outputs

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy of [B, K] logits with 0 and 1, mean squared error of standardised numbers, or the partial
        likelihood of log hazards [B, 1], whose targets are event and time [B, 2]."""
        known = torch.isfinite(targets)
        if self.kind == "survival":
            rows = known.all(dim=1)
            return cox_loss(outputs[rows, 0], *targets[rows].unbind(dim=1))
        if self.kind == "classes":
            rows = known.all(dim=1)
            return functional.cross_entropy(outputs[rows], targets[rows])
        if self.kind == "yes-no":
            return functional.binary_cross_entropy_with_logits(outputs[known], targets[known])
        return functional.mse_loss(outputs[known], ((targets - self.target_centre) / self.target_scale)[known])

    def probabilities(self, outputs: Tensor) -> Tensor:
        """Probabilities of yes or of the classes, numbers in their own units, or log hazards."""
        if self.kind == "survival":
            return outputs
        if self.kind == "classes":
            return outputs.softmax(dim=1)
        return outputs.sigmoid() if self.kind == "yes-no" else outputs * self.target_scale + self.target_centre


class SegmentationHead(TaskHead):
    """Decoder from the patches of one stream to its voxels."""

    rate_factor = 10.0

    def __init__(self, stream: str, config: StreamConfig, width: int, classes: int) -> None:
        super().__init__()
        self.stream, self.grid = stream, config.grid
        self.steps = upsampling_steps(config.patch)
        """Upsampling factor of each axis at each level, coarse to fine."""
        least, greatest = _COARSE_CHANNELS
        coarse = min(max(width // 2, least), greatest)
        channels = [max(coarse >> level, _FINE_CHANNELS) for level in range(len(self.steps) + 1)]
        axes = len(config.shape)
        self.tokens = _conv_block(2 * width, channels[0], axes, kernel=1)
        fine_to_coarse = [config.channels, *reversed(channels[1:])]
        self.image_levels = nn.ModuleList(_conv_block(*pair, axes) for pair in pairwise(fine_to_coarse))
        self.decoder = nn.ModuleList(_conv_block(coarse + fine, fine, axes) for coarse, fine in pairwise(channels))
        self.classify = _convolution(axes)(channels[-1], classes, 1)
        self.classes = classes

    @torch.no_grad()
    def start_at_shares(self, masks: Iterable[Tensor]) -> None:
        """Set the last bias so that the untrained head predicts each class with its share of the training voxels.

        Without this most of the first steps go into learning that nearly all voxels are background, and small classes
        are never predicted (Lin et al. 2017, arXiv 1708.02002, section 3.3).
        """
        counts = torch.ones(self.classes, dtype=torch.long)
        for mask in masks:
            counts += torch.bincount(mask.flatten().long(), minlength=self.classes)
        assert self.classify.bias is not None
        self.classify.bias.copy_((counts / counts.sum()).log())

    def forward(self, model: PanModel, batch: Batch) -> Tensor:
        """Predict logits [P, K, *shape] for the images of the stream."""
        batch = batch.to(model.stream_of_patch.device)
        images = batch.images[self.stream]
        x = self.tokens(self._token_maps(model, batch))
        skips = [images]
        for number, level in enumerate(self.image_levels):
            pooled = skips[-1] if number == 0 else _shrink(skips[-1], self.steps[-number])
            skips.append(level(pooled))
        for step, skip, level in zip(self.steps, reversed(skips), self.decoder, strict=False):
            x = level(torch.cat([_enlarge(x, step), skip], dim=1))
        logits: Tensor = self.classify(x)
        return logits

    def _token_maps(self, model: PanModel, batch: Batch) -> Tensor:
        """Tokens after the last norm and after the middle block, as maps [P, 2 D, *grid]."""
        encoded = model.encode(model.patch_features(batch), keep_blocks=True)
        stream_of_token = model.stream_of_patch[encoded.layout.patch_index]
        chosen = encoded.layout.valid & (stream_of_token == model.stream_names.index(self.stream))
        middle = functional.layer_norm(encoded.blocks[(len(encoded.blocks) - 1) // 2], (model.width,), eps=1e-6)
        maps = torch.cat([encoded.tokens, middle], dim=2)[chosen]
        return maps.view(len(batch.images[self.stream]), *self.grid, -1).movedim(-1, 1).contiguous()

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy plus 1 minus the soft Dice of the classes without background; targets [P, *shape]."""
        classes = targets.long()
        is_class = functional.one_hot(classes, outputs.shape[1]).movedim(-1, 1)[:, 1:].flatten(2)
        shares = outputs.softmax(dim=1)[:, 1:].flatten(2)
        overlap = (shares * is_class).sum(dim=2)
        dice = (2.0 * overlap + _SMOOTH) / (shares.sum(dim=2) + is_class.sum(dim=2) + _SMOOTH)
        return functional.cross_entropy(outputs, classes) + 1.0 - dice.mean()

    def probabilities(self, outputs: Tensor) -> Tensor:
        """Probabilities of the classes [P, K, *shape]."""
        return outputs.softmax(dim=1)


def build_head(model: PanModel, task: TaskDescription, seed: int) -> TaskHead:
    """Build the head of a task for a model; the seed and the parameters' names decide its random parameters."""
    head: TaskHead
    with torch.random.fork_rng(devices=[]):
        if task.kind == "segmentation":
            assert task.stream is not None
            head = SegmentationHead(task.stream, model.stream_configs[task.stream], model.width, len(task.values))
        else:
            head = LabelHead(task.kind, model.embedding_size, len(task.outputs))
    for name, parameter in head.named_parameters():
        generator = torch_generator(seed, "task-head", name)
        if name == "classify.weight":
            nn.init.normal_(parameter, std=_CLASSIFY_DEVIATION, generator=generator)
        elif parameter.dim() > 2:
            nn.init.kaiming_normal_(parameter, generator=generator)
        elif name.endswith(".bias"):
            nn.init.zeros_(parameter)
    return head


@torch.no_grad()
def predict_rows(
    head: TaskHead, model: PanModel, store: ImageStore, indices: NDArray[np.int64], batch_size: int = 32
) -> Iterator[NDArray[np.float32]]:
    """Yield probabilities of classes, or numbers, for some rows of a store, batch by batch. A segmentation's are on the
    grid of its stream, which all rows must have."""
    model.eval()
    for start in range(0, len(indices), batch_size):
        batch = store.batch(indices[start : start + batch_size])
        yield head.probabilities(head(model, batch)).float().cpu().numpy()


def upsampling_steps(patch: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Upsampling factors from one patch to its voxels, one tuple per level, coarse to fine: the prime factors of every
    axis of the patch, and 1 at the levels for which an axis has no more."""
    factors = [_prime_factors(size) for size in patch]
    depth = max(len(own) for own in factors)
    return list(zip(*((1,) * (depth - len(own)) + own for own in factors), strict=True)) or [(1,) * len(patch)]


def _prime_factors(number: int) -> tuple[int, ...]:
    factors, divisor = [], 2
    while number > 1:
        while number % divisor == 0:
            factors.append(divisor)
            number //= divisor
        divisor += 1
    return tuple(reversed(factors))


def _convolution(axes: int) -> type[nn.Conv2d] | type[nn.Conv3d]:
    return nn.Conv3d if axes == 3 else nn.Conv2d


def _conv_block(channels_in: int, channels_out: int, axes: int, kernel: int = 3) -> nn.Sequential:
    """Convolution, group norm, leaky ReLU."""
    convolve = _convolution(axes)(channels_in, channels_out, kernel, padding=kernel // 2, bias=False)
    return nn.Sequential(convolve, nn.GroupNorm(_NORM_GROUPS, channels_out), nn.LeakyReLU(0.01))


def _shrink(x: Tensor, step: tuple[int, ...]) -> Tensor:
    pool = functional.avg_pool3d if x.dim() == 5 else functional.avg_pool2d
    return pool(x, step)


def _enlarge(x: Tensor, step: tuple[int, ...]) -> Tensor:
    size = [length * factor for length, factor in zip(x.shape[2:], step, strict=True)]
    return functional.interpolate(x, size=size, mode="trilinear" if x.dim() == 5 else "bilinear")
