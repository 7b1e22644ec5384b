"""Training loop of a fine-tuning: trains a task's head, which replaces the heads of pre-training, and encoder parts.

    step        batch of examples -> head(encoder) -> loss -> AdamW with layer-wise decay of the learning rate
    validation  every `validate_every` steps; the parameters with the smallest loss are kept, and training stops after
                `patience` validations without a smaller one, counted from the end of the warm-up

Every draw follows from the seed and the number of the step, and each validation writes a checkpoint, so that a
fine-tuning that was interrupted ends with the same bits.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional

from panfm.config import dump_toml
from panfm.config.augment import AugmentConfig
from panfm.config.parts import LoraConfig
from panfm.data.augmentation import Augmentation
from panfm.data.store import Batch
from panfm.errors import DataError, RunError
from panfm.evaluate.embed import embed_store
from panfm.files import read_checked, write_checked
from panfm.finetune.finetune_settings import FinetuneParts, FinetuneSettings
from panfm.finetune.task_data import Indices, TaskData
from panfm.finetune.task_heads import LabelHead, SegmentationHead, TaskHead, build_head
from panfm.models import PanModel
from panfm.models.pan import initialise
from panfm.models.trained_parts import add_lora, is_lora, trained_names
from panfm.seeds import numpy_generator, torch_generator
from panfm.training.schedules import learning_rate, progress_of
from panfm.training.training_state import build_optimiser

CHECKPOINT = "checkpoint.state"
_AUGMENT = AugmentConfig(crop=(0.5, 1.0), rotation=0.2, blur=0.0, noise=0.0)
"""Augmentation for masks and classes. Labels that are numbers may be sizes, so their images are not cropped."""
_HEADS = "heads."
_BEST, _MODEL, _OPTIMISER = "best.", "model.", "optimiser."


@dataclass(frozen=True)
class FinetuneProgress:
    """Steps and validation losses of a fine-tuning so far."""

    step: int = 0
    """Steps taken."""
    best_step: int = 0
    """Number of steps after which the validation loss was smallest."""
    best_loss: float = float("inf")
    since_best: int = 0
    """Validations since `best_step` that brought no smaller loss; those within the warm-up are not counted."""
    losses: tuple[tuple[int, float], ...] = ()
    """For every validation: the steps taken before it, and its loss."""


class FineTuning:
    """Trains a model with a task's head, and validates it.

    Guarantees:
        exact: one that is interrupted and resumed ends with the same bits as one that is not, on the CPU.
        best: after `run`, the parameters are those of the validation with the smallest loss.
    """

    def __init__(self, model: PanModel, data: TaskData, settings: FinetuneSettings) -> None:
        """Replace the model's heads by the task's head, and choose which parameters are trained.

        Args:
            model: Its heads are replaced.
        Raises:
            ConfigError: the parts name more blocks than there are, or blocks without attention of ours.
        """
        self.settings, self.data = settings, data
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.head: TaskHead = build_head(model, data.task, settings.seed)
        model.add_module("heads", self.head)
        choose_parts(model, settings.parts, settings.seed)
        self.model = model.to(self.device).eval()
        strengths = _AUGMENT.model_copy(update={"crop": (1.0, 1.0)}) if data.task.kind == "number" else _AUGMENT
        self.augmentation = Augmentation(strengths, model.stream_configs) if settings.augment else None
        self._targets = torch.from_numpy(np.asarray(data.targets, dtype=_target_dtype(data)))
        if isinstance(self.head, LabelHead):
            train, validation = (self._embedded(rows) for rows in (data.train, data.validation))
            self.head.standardise(*train)
            self.head.fit(train, validation)
        elif isinstance(self.head, SegmentationHead):
            large = {row: torch.from_numpy(scan.mask) for row, scan in data.large.items()}
            self.head.start_at_shares(large.get(row, self._targets[row]) for row in data.train.tolist())
        self.optimiser = build_optimiser(self.model, settings.training())
        scale_rates(self.optimiser, self.head)
        self.progress = FinetuneProgress()
        self._best = self._kept_state()
        self._origin = self._hash()

    def run(self, folder: Path | None = None, on_step: Callable[[int, int], None] = lambda *_: None) -> None:
        """Train until the steps are done or validation gets no better, then load the best parameters.

        Args:
            folder: Where a checkpoint is written at every validation.
            on_step: Called with (steps taken, steps in all).
        Raises:
            RunError: a loss is not finite.
        """
        settings = self.settings
        while self.progress.step < settings.steps and self.progress.since_best < settings.patience:
            if self.progress.step % settings.validate_every == 0 and not self._is_validated():
                self._validate(folder)
                continue
            self._step(self.progress.step)
            self.progress = replace(self.progress, step=self.progress.step + 1)
            on_step(self.progress.step, settings.steps)
        if not self._is_validated():
            self._validate(folder)
        self.model.load_state_dict(self.model.state_dict() | self._best)

    def _augmented(self, number: int, chosen: Indices) -> tuple[Batch, Tensor]:
        """Augmented images of a step, and their targets: labels, or masks cropped, turned and flipped like them."""
        batch, targets = self._examples(chosen, number)
        if self.augmentation is None:
            return batch, targets

        def generators() -> list[torch.Generator]:
            seed = self.settings.seed
            return [torch_generator(seed, "fine-tuning", "augmentation", number, int(row)) for row in chosen]

        batch = self.augmentation.vary(batch, generators())
        if (stream := self.data.task.stream) is not None:
            is_class = functional.one_hot(targets.long(), len(self.data.task.values)).movedim(-1, 1).float()
            targets = self.augmentation.move(stream, is_class, generators()).argmax(dim=1).to(targets.dtype)
        return batch, targets

    def _is_validated(self) -> bool:
        return bool(self.progress.losses) and self.progress.losses[-1][0] == self.progress.step

    def _step(self, number: int) -> None:
        chosen = batch_of_step(self.data.train, self.settings.batch_size, number, self.settings.seed)
        batch, targets = self._augmented(number, chosen)
        loss = self.head.loss(self.head(self.model, batch), targets)
        self.optimiser.zero_grad()
        loss.backward()
        training = self.settings.training()
        parameters = [parameter for parameter in self.model.parameters() if parameter.grad is not None]
        norm = nn.utils.clip_grad_norm_(parameters, training.clip_norm)
        if not bool(torch.isfinite(loss) & torch.isfinite(norm)):
            raise RunError(f"step {number + 1}: loss or gradient is not finite, expected a smaller --learning-rate")
        rate = learning_rate(training, progress_of(training, number))
        for group in self.optimiser.param_groups:
            group["lr"] = rate * group["scale"]
        self.optimiser.step()

    @torch.no_grad()
    def _validate(self, folder: Path | None) -> None:
        loss, before = self._validation_loss(), self.progress
        losses = (*before.losses, (before.step, loss))
        if loss < before.best_loss:
            self._best = self._kept_state()
            self.progress = replace(before, best_step=before.step, best_loss=loss, since_best=0, losses=losses)
        else:
            training = self.settings.training()
            counts = progress_of(training, before.step) >= training.warmup
            self.progress = replace(before, since_best=before.since_best + counts, losses=losses)
        if folder is not None:
            self.save(folder)

    def _validation_loss(self) -> float:
        """Mean loss of the validation examples; where it compares examples, of all of them together."""
        size, validation = self.settings.batch_size, self.data.validation
        examples = (
            self._examples(validation[start : start + size], "validation") for start in range(0, len(validation), size)
        )
        predicted = ((self.head(self.model, batch), targets) for batch, targets in examples)
        if self.head.compares_examples:
            outputs, all_targets = zip(*predicted, strict=True)
            return float(self.head.loss(torch.cat(outputs), torch.cat(all_targets)))
        total = sum(len(targets) * float(self.head.loss(outputs, targets)) for outputs, targets in predicted)
        return total / len(validation)

    def notes(self) -> tuple[str, ...]:
        """One line if no step lowered the validation loss, and one if training stopped early."""
        progress, steps, notes = self.progress, self.settings.steps, []
        if progress.best_step == 0:
            notes.append("training: no validation was better than the one before the first step, whose model is kept")
        if progress.step < steps:
            notes.append(f"training: stopped after {progress.step} of {steps} steps, best after {progress.best_step}")
        return tuple(notes)

    def _examples(self, chosen: Indices, purpose: int | str) -> tuple[Batch, Tensor]:
        """Images and targets of some examples; one window of each scan that is larger than the stream's grid.

        Args:
            purpose: Decides, with the seed, where windows lie: the number of the step, or the validation.
        """
        batch, targets = self.data.store.batch(chosen), self._targets[torch.from_numpy(chosen)]
        if (stream := self.data.task.stream) is not None and self.data.large:
            images = batch.images[stream].clone()
            for at, row in enumerate(chosen.tolist()):
                if large := self.data.large.get(row):
                    generator = torch_generator(self.settings.seed, "fine-tuning", "window", purpose, row)
                    images[at], targets[at] = large.window(images.shape[2:], generator)
            batch = Batch(batch.size, batch.images | {stream: images}, batch.rows)
        return batch.to(self.device), targets.to(self.device)

    def _embedded(self, chosen: Indices) -> tuple[Tensor, Tensor]:
        """Embeddings and targets of some examples."""
        embeddings = embed_store(self.model, self.data.store, chosen, batch_size=self.settings.batch_size)
        return torch.from_numpy(embeddings).to(self.device), self._targets[torch.from_numpy(chosen)].to(self.device)

    def _kept_state(self) -> dict[str, Tensor]:
        """Copy the trained parameters, and all parameters and buffers of the head, by name."""
        state = self.model.state_dict()
        return {
            name: value.detach().cpu().clone()
            for name, value in state.items()
            if name in self.model.trained or name.startswith(_HEADS)
        }

    def save(self, folder: Path) -> None:
        """Write `checkpoint.state`, from which `load` goes on."""
        tensors = {f"{_MODEL}{name}": value for name, value in self._kept_state().items()}
        tensors |= {f"{_BEST}{name}": value for name, value in self._best.items()}
        for index, slots in self.optimiser.state_dict()["state"].items():
            tensors |= {f"{_OPTIMISER}{index}.{slot}": value.cpu().clone() for slot, value in slots.items()}
        told = {"progress": json.dumps(asdict(self.progress)), "origin": self._origin}
        write_checked(folder / CHECKPOINT, safetensors.torch.save(tensors, told))

    def load(self, folder: Path) -> None:
        """Go on from the checkpoint, if there is one.

        Raises:
            DataError: it is damaged, or model, images, labels or settings have changed since it was written.
        """
        path = folder / CHECKPOINT
        if not path.exists():
            return
        tensors, told = _read_tensors(path)
        if told["origin"] != self._origin:
            raise DataError(
                f"{path}: the model, the images, the patients or the settings have changed since, expected the same"
            )
        progress = json.loads(told["progress"])
        losses = tuple((step, loss) for step, loss in progress.pop("losses"))
        self.progress = FinetuneProgress(**progress, losses=losses)
        self.model.load_state_dict(self.model.state_dict() | _under(tensors, _MODEL))
        self._best = _under(tensors, _BEST)
        state: dict[int, dict[str, Tensor]] = {}
        for name, value in _under(tensors, _OPTIMISER).items():
            index, slot = name.split(".", 1)
            state.setdefault(int(index), {})[slot] = value
        self.optimiser.load_state_dict(self.optimiser.state_dict() | {"state": state})

    def _hash(self) -> str:
        """Hash everything that decides the result: first parameters, images, patients, targets and settings."""
        digest = hashlib.sha256(dump_toml(self.settings).encode())
        for _, value in sorted(self.model.state_dict().items()):
            digest.update(value.detach().cpu().numpy().tobytes())
        for _, of_stream in sorted(self.data.store.digests.items()):
            digest.update(b"".join(of_stream))
        for part in (self.data.train, self.data.validation, self.data.test):
            digest.update(json.dumps(self.data.patients(part)).encode())
        digest.update(self._targets.numpy().tobytes())
        for _, large in sorted(self.data.large.items()):
            digest.update(large.mask.tobytes())
        return digest.hexdigest()


def scale_rates(optimiser: torch.optim.Optimizer, head: TaskHead) -> None:
    """Move the head's parameters to optimiser groups of their own, whose learning rate has the head's factor."""
    of_head = set(head.parameters())
    for group in list(optimiser.param_groups):
        moved = [parameter for parameter in group["params"] if parameter in of_head]
        if moved:
            group["params"] = [parameter for parameter in group["params"] if parameter not in of_head]
            optimiser.add_param_group({**group, "params": moved, "scale": group["scale"] * head.rate_factor})


def choose_parts(model: PanModel, parts: FinetuneParts, seed: int) -> None:
    """Let the head and the chosen parts of the encoder be trained; all other parameters get no gradient."""
    named = dict(model.named_parameters())
    trained = {name for name in named if name.startswith(_HEADS)}
    if isinstance(parts, LoraConfig):
        add_lora(model.backbone, parts)
        for name, parameter in model.named_parameters():
            if is_lora(name):
                initialise(name, parameter, torch_generator(seed, "fine-tuning", name))
    model.trained = trained_names(model, parts) | trained
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in model.trained)


def batch_of_step(indices: Indices, size: int, step: int, seed: int) -> Indices:
    """Choose the examples of one step. Steps pass over all examples again and again, each pass in a new seeded order; a
    pass leaves out the last examples if they do not fill a batch."""
    per_pass = max(len(indices) // size, 1)
    number, at = divmod(step, per_pass)
    order = numpy_generator(seed, "fine-tuning", "order", number).permutation(indices)
    return order[at * size : (at + 1) * size]


def _target_dtype(data: TaskData) -> type[np.generic]:
    return np.uint8 if data.task.kind == "segmentation" else np.float32


def _read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    content = read_checked(path)
    length = int.from_bytes(content[:8], "little")
    return safetensors.torch.load(content), json.loads(content[8 : 8 + length])["__metadata__"]


def _under(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
