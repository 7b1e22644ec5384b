"""Writes the head that a federated run has trained, as the head of a fine-tuned model: `task.json`, `head.safetensors`.

The run's own head is a linear layer on the embedding; a fine-tuned model's also standardises the embedding, which is
the identity here, and brings a number to its own unit.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray

from panfm.config.task import TaskConfig
from panfm.files import write_atomic
from panfm.finetune.task_description import HEAD_FILE, TaskDescription, write_task
from panfm.models.pan import TASK_HEAD


def describe_task(task: TaskConfig) -> TaskDescription:
    """Describe a run's task as that of a fine-tuned model."""
    return TaskDescription(kind=task.kind, name=task.label, outputs=task.outputs)


def head_state(task: TaskConfig, state: Mapping[str, NDArray[np.float32]]) -> dict[str, NDArray[np.float32]]:
    """Parameters and buffers of a `LabelHead` that predicts what the head of a run's model does.

    Args:
        state: The run's parameters, by name.
    """
    weight, bias = (state[f"heads.{TASK_HEAD}.{name}"] for name in ("weight", "bias"))
    outputs, size = weight.shape
    centre, scale = task.centre or 0.0, task.scale or 1.0
    return {
        "linear.weight": weight,
        "linear.bias": bias,
        "centre": np.zeros(size, np.float32),
        "scale": np.ones(size, np.float32),
        "target_centre": np.full(outputs, centre, np.float32),
        "target_scale": np.full(outputs, scale, np.float32),
    }


def write_head(folder: Path, task: TaskConfig, state: Mapping[str, NDArray[np.float32]]) -> None:
    """Write a run's head and task into its model folder, which `panfm.load` then reads as a fine-tuned model."""
    write_atomic(folder / HEAD_FILE, safetensors.numpy.save(head_state(task, state)))
    write_task(folder, describe_task(task))
