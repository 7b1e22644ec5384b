"""Settings of a fine-tuning, and their file `finetune.toml` in its folder. Imports no torch."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BeforeValidator, Field, TypeAdapter, ValidationError

from panfm.config import dump_toml
from panfm.config.base import Config, Positive, Seed
from panfm.config.parts import BlockPartsConfig, LoraConfig, PlainPartsConfig
from panfm.config.training import TrainConfig
from panfm.errors import ConfigError, DataError, reason
from panfm.files import write_atomic
from panfm.outputs import check_place
from panfm.texts import parse_toml, read_text

SETTINGS_FILE = "finetune.toml"
PARTS_HELP = "head, all, norms, vectors, last-blocks:N, attention-projections:N, lora:N or lora:N:RANK"


FinetuneParts = Annotated[PlainPartsConfig | BlockPartsConfig | LoraConfig, Field(discriminator="kind")]
"""The head, and the parts of the encoder that are trained with it, by the names of `[train.parts]`."""


def _read_parts(value: Any) -> Any:
    """Turn the short form, e.g. `lora:2:8`, into a table."""
    if not isinstance(value, str):
        return value
    kind, *numbers = value.split(":")
    if len(numbers) > 2:
        raise ValueError(f"expected {PARTS_HELP}")
    return {"kind": kind} | dict(zip(("blocks", "rank"), map(int, numbers), strict=False))


class FinetuneSettings(Config):
    """All settings of a fine-tuning; with the files that it reads they decide its result."""

    model: str
    """Folder of the run, or of its model."""
    data: Annotated[tuple[str, ...], Field(strict=False, min_length=1)]
    """Site folders, whose patients are pooled."""
    task: str
    """`labels.csv:COLUMN` or `segmentation`."""
    time: str | None = None
    """Column of the same table with the time to the event that the task's column tells (yes), or to the end of
    follow-up (no): fits a Cox model."""
    streams: Annotated[tuple[str, ...], Field(strict=False)] = ()
    """Streams whose images are read; all streams of the model when empty."""
    masked_stream: str | None = None
    """For a segmentation: the stream whose masks are learned; may be left out if only one stream has masks."""
    parts: Annotated[FinetuneParts, BeforeValidator(_read_parts)] = PlainPartsConfig()
    pooling: str | None = None
    """Pooling that replaces the run's, as `panfm embed --pooling` takes it; a segmentation does not use it."""
    patients: Annotated[int, Field(ge=2)] | None = None
    """Number of patients whose labels are learned from, at least one of them for validation; all when left out."""
    from_scratch: bool = False
    """Whether to start from the untrained model of the run, for comparison."""
    augment: bool = True
    """Whether the images of every step are cropped (unless the labels are numbers), turned, flipped (and their masks
    with them) and varied in intensity, mildly, as `[augment]` does."""
    steps: Annotated[int, Field(gt=0, le=10_000_000)] = 300
    batch_size: Annotated[int, Field(gt=0, le=65_536)] = 8
    """Examples per step: images of a segmentation, visits of patients for labels."""
    learning_rate: Annotated[float, Field(ge=1e-9, le=10.0)] = 1e-3
    """Learning rate of a label head; that of a segmentation's decoder is ten times as large. Linear warm-up over a
    tenth of the steps, then cosine to 0."""
    layer_decay: Annotated[float, Field(ge=0.01, le=1.0)] = 0.75
    """Each layer has this times the learning rate of the layer above it (arXiv 2106.08254)."""
    weight_decay: Annotated[float, Field(ge=0.0, le=10.0)] = 0.05
    validate_every: Positive = 20
    """Steps between validations; each validation writes a checkpoint."""
    patience: Positive = 6
    """Training stops after this many validations in a row, after the warm-up, without a smaller loss."""
    seed: Seed = 0

    @classmethod
    def of_options(cls, given: Mapping[str, Any]) -> Self:
        """Make settings from options, by field name. Raises ConfigError, with the option's name: it is not valid."""
        try:
            return cls.model_validate(given)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            option = str(first["loc"][0]).replace("_", "-")
            raise ConfigError(
                f"--{option}: found {first['input']!r:.80}, expected {_expected(first['msg'])}"
            ) from error

    def training(self) -> TrainConfig:
        """Return the settings of the optimiser and its schedule, as a run's `[train]`."""
        return TrainConfig(
            rounds=1,
            local_steps=self.steps,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            layer_decay=self.layer_decay,
            weight_decay=self.weight_decay,
        )


def _expected(message: str) -> str:
    return message.removeprefix("Input should be ")


def parse_parts(text: str) -> FinetuneParts:
    """Read the option `--parts`. Raises ConfigError: it does not have one of the forms of `PARTS_HELP`."""
    try:
        parts: FinetuneParts = TypeAdapter(FinetuneParts).validate_python(_read_parts(text))
    except (ValidationError, ValueError):
        raise ConfigError(f"--parts: found {text!r:.80}, expected {PARTS_HELP} (N: blocks, from the last)") from None
    return parts


def write_settings(folder: Path, settings: FinetuneSettings) -> None:
    """Write `finetune.toml`."""
    write_atomic(folder / SETTINGS_FILE, dump_toml(settings).encode())


def read_settings(folder: Path) -> FinetuneSettings:
    """Read `finetune.toml` of a folder. Raises ConfigError: it is absent or not valid."""
    path = folder / SETTINGS_FILE
    try:
        table = parse_toml(read_text(path), str(path))
    except (OSError, UnicodeDecodeError) as error:
        expected = "the folder of a fine-tuning that was begun"
        raise ConfigError(f"{path}: cannot be read ({reason(error)}), expected {expected}") from error
    try:
        return FinetuneSettings.model_validate(table, by_alias=True, by_name=False)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise ConfigError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error


def settings_to_resume(folder: Path) -> FinetuneSettings:
    """Read the settings of a fine-tuning that was interrupted.

    Raises:
        ConfigError: `finetune.toml` is absent or not valid.
        DataError: the fine-tuning has ended.
    """
    settings = read_settings(folder)
    refuse_ended(folder)
    return settings


def refuse_ended(folder: Path) -> None:
    """Raise DataError if the folder holds a fine-tuning that has ended."""
    if (folder / "model").exists():
        raise DataError(f"{folder}: has ended, its model is in {folder / 'model'}; expected one that was interrupted")


def new_folder_for(folder: Path) -> Path:
    """Check that a new folder can be made. Raises DataError: it exists already, or cannot be made."""
    if folder.exists():
        raise DataError(f"{folder}: exists already, expected a new folder (--resume {folder} goes on with it)")
    try:
        check_place(folder)
    except OSError as error:
        raise DataError(f"{folder}: cannot be made ({reason(error)}), expected a folder that can be written") from error
    return folder
