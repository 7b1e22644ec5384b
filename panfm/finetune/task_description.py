"""Describes the task of a fine-tuned model, and reads and writes it as `task.json`. Imports no torch."""

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from panfm.config.base import Config
from panfm.errors import ConfigError, DataError, reason
from panfm.outputs import write_json

TASK_FILE, HEAD_FILE = "task.json", "head.safetensors"
TASK_FILES = (TASK_FILE, HEAD_FILE)
"""Files that a fine-tuned model's folder has beside the encoder's weights."""
SEGMENTATION = "segmentation"

Kind = Literal["yes-no", "classes", "number", "survival", "segmentation"]


class TaskDescription(Config):
    """The task that a model was fine-tuned for: labels of one column, or masks of one stream."""

    kind: Kind
    name: str
    """Column of the label table, for survival that of the event; `segmentation` for masks."""
    outputs: Annotated[tuple[str, ...], Field(strict=False)]
    """One name per output: the label, or `<label>=<class>`; for a segmentation the class numbers as text."""
    time: str | None = None
    """Column of the time to the event, or to the end of follow-up, for survival."""
    values: Annotated[tuple[int, ...], Field(strict=False)] = ()
    """For a segmentation: the number of each class in a mask, background (0) first."""
    stream: str | None = None
    """For a segmentation: the stream whose images are segmented."""


def parse_task(text: str) -> tuple[str, str] | None:
    """Read `--task`: the path of a label table and its column, or None for `segmentation`.

    Raises:
        ConfigError: the text has neither form.
    """
    if text == SEGMENTATION:
        return None
    table, colon, column = text.rpartition(":")
    if not (table and colon and column):
        raise ConfigError(f"--task: found {text!r:.80}, expected labels.csv:COLUMN, or {SEGMENTATION}")
    return table, column


def write_task(folder: Path, task: TaskDescription) -> None:
    """Write `task.json` into the folder of a model."""
    write_json(folder / TASK_FILE, task.model_dump(mode="json", by_alias=True, exclude_none=True), indent=1)


def read_task(folder: Path) -> TaskDescription | None:
    """Read the task of a model; None if the model was not fine-tuned. Raises DataError: `task.json` is not valid."""
    path = folder / TASK_FILE
    if not path.exists():
        return None
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
        return TaskDescription.model_validate(content, by_alias=True, by_name=False)
    except (OSError, ValueError, RecursionError, ValidationError) as error:
        raise DataError(f"{path}: not the task of a fine-tuned model ({reason(error)})") from error
