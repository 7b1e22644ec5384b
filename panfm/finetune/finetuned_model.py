"""A fine-tuned model on disk and in memory: encoder and head in one folder, and predictions from images.

model.safetensors, run.toml, metadata.json     the fine-tuned encoder, as the folder of any run's model
head.safetensors, task.json                    the head, and what it predicts
"""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import safetensors.torch
from numpy.typing import NDArray
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor

from panfm.config import RunConfig, StreamConfig, dump_toml
from panfm.data.masks import Classes, mask_from_grid
from panfm.data.readers import ImageError, Picture, Volume, read_source
from panfm.data.store import ImageStore
from panfm.errors import DataError, reason
from panfm.files import write_atomic
from panfm.finetune.task_description import HEAD_FILE, TASK_FILE, TaskDescription, read_task, write_task
from panfm.finetune.task_heads import TaskHead, build_head, predict_rows
from panfm.finetune.windows import predict_map
from panfm.models import PanModel
from panfm.models.low_rank import fit_lora
from panfm.outputs import new_folder, write_json

_HEADS = "heads."
SegmentedImage = nib.Nifti1Image | Picture
"""A mask as an image: NIfTI with the affine and shape of its scan, or a picture of the size of its picture."""


@dataclass(frozen=True)
class TaskModel:
    """Task and head of a fine-tuned model; the encoder is passed to its methods as `model`."""

    task: TaskDescription
    head: TaskHead

    def predict(self, model: PanModel, store: ImageStore) -> NDArray[np.float32]:
        """Predict the outputs [N, K] for all rows of a store."""
        chunks = list(predict_rows(self.head, model, store, np.arange(len(store.subjects))))
        return np.concatenate(chunks) if chunks else np.empty((0, len(self.task.outputs)), np.float32)

    def segment(self, model: PanModel, store: ImageStore, paths: Mapping[int, Path]) -> Iterator[SegmentedImage]:
        """Segment images of the task's stream.

        Args:
            store: Holds the stream for every row of `paths`.
            paths: Row -> file of the image, ascending.
        """
        assert self.task.stream is not None
        for row, path in paths.items():
            image = read_for_segmentation(path, model.stream_configs[self.task.stream])
            probabilities, grid = predict_map(self.head, model, store, row, image, self.task.stream)
            yield mask_image(mask_from_grid(probabilities, image, grid), image, self.task)


def read_for_segmentation(path: Path, config: StreamConfig) -> Volume | Picture:
    """Read an image on its own grid. Raises DataError, which begins with the path: it cannot be read."""
    try:
        return read_source(path, is_volume=config.is_volume, nan=config.nan)
    except ImageError as error:
        raise DataError(f"{path}: {error}") from error


def mask_image(classes: Classes, image: Volume | Picture, task: TaskDescription) -> SegmentedImage:
    """Make a mask image from predicted classes, with the class numbers of the training masks."""
    numbers = np.asarray(task.values)[classes].astype(np.uint8 if max(task.values) < 256 else np.uint16)
    if isinstance(image, Volume):
        mask = nib.Nifti1Image(numbers, image.affine)  # type: ignore[no-untyped-call]
        mask.header.set_xyzt_units("mm")  # type: ignore[no-untyped-call]
        return mask
    return Image.fromarray(numbers)


def write_mask(path: Path, mask: SegmentedImage) -> Path:
    """Write a mask to a path without suffix, to which `.nii.gz` or `.png` is added; return the whole path."""
    whole = path.with_name(f"{path.name}{'.nii.gz' if isinstance(mask, nib.Nifti1Image) else '.png'}")
    if isinstance(mask, nib.Nifti1Image):
        nib.save(mask, whole)
    else:
        mask.save(whole)
    return whole


def write_finetuned(
    folder: Path,
    model: PanModel,
    run: RunConfig,
    task: TaskDescription,
    *,
    heads: Mapping[str, Tensor],
    metadata: Mapping[str, Any],
) -> None:
    """Write a fine-tuned model as a new folder that `panfm.load`, `panfm embed` and `panfm export` read.

    Args:
        model: The fine-tuned model with the task's head; low-rank additions are added to the weights.
        run: Description of the encoder, without trained parts or whitening.
        heads: The pre-training heads, which stay as they were.
        metadata: Of the model; its `model-hash` becomes that of the new weights.
    Raises:
        DataError: the folder exists, or cannot be written.
    """
    state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    encoder = {name: value for name, value in state.items() if not name.startswith(_HEADS)}
    plain = {name: value for name, value in encoder.items() if ".lora_" not in name}
    weights = fit_lora(encoder, plain) | dict(heads)
    head = {name.removeprefix(_HEADS): value for name, value in state.items() if name.startswith(_HEADS)}
    with new_folder(folder) as partial:
        content = safetensors.torch.save(weights)
        write_atomic(partial / "model.safetensors", content)
        write_atomic(partial / "run.toml", dump_toml(run).encode())
        told = dict(metadata) | {"model-hash": hashlib.sha256(content).hexdigest()}
        write_json(partial / "metadata.json", told, indent=2)
        write_atomic(partial / HEAD_FILE, safetensors.torch.save(head))
        write_task(partial, task)


def read_task_model(folder: Path, model: PanModel) -> TaskModel | None:
    """Read task and head of a fine-tuned model; None if the model was not fine-tuned.

    Raises:
        DataError: `task.json` or the head is not valid, or does not fit the model.
    """
    if (task := read_task(folder)) is None:
        return None
    if task.stream is not None and task.stream not in model.stream_configs:
        raise DataError(f"{folder / TASK_FILE}: stream {task.stream!r:.80}, expected one of the model")
    head, path = build_head(model, task, 0), folder / HEAD_FILE
    try:
        head.load_state_dict(safetensors.torch.load_file(path))
    except (OSError, ValueError, SafetensorError, RuntimeError) as error:
        raise DataError(f"{path}: not the head of this model ({reason(error)})") from error
    return TaskModel(task, head.requires_grad_(requires_grad=False).to(model.stream_of_patch.device))
