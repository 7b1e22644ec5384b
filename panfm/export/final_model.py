"""Reads what is exported: the final model of a run folder, and the metadata that go with it."""

import hashlib
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from panfm import __version__
from panfm.anatomy import Modality, parse_stream
from panfm.config import RunConfig, StreamConfig
from panfm.config.sharing import SharingConfig
from panfm.data.intensity import GREY_LEVELS, HU_WINDOW, PERCENTILES
from panfm.errors import ConfigError, DataError, reason
from panfm.evaluate.embed import load_model
from panfm.evaluate.model_folder import model_folder
from panfm.export.network import batch_of, random_inputs, require_equal
from panfm.finetune.task_description import TASK_FILE, TASK_FILES
from panfm.models import PanModel
from panfm.models.whitening import FILE as WHITENING
from panfm.outputs import write_json
from panfm.privacy.guarantees import privacy_label
from panfm.sharing.groups import EXPERTS, is_shared
from panfm.texts import parse_json, read_text

_MAX_METADATA_BYTES = 1 << 20
NOT_PRIVATE = "none: not private"
LICENCE_UNKNOWN = "not stated; ask the sites that trained the model"


class _Written(BaseModel):
    """Metadata of the model itself that an export passes on."""

    model_config = ConfigDict(alias_generator=lambda name: name.replace("_", "-"))
    name: str
    run_id: str
    rounds: int
    sites: list[str]
    intended_use: str
    whitening: str | None = None
    task: str | None = None
    """Task that the model was fine-tuned for."""
    fine_tuned_on: int | None = None
    """Number of training patients of the fine-tuning."""


@dataclass(frozen=True)
class Source:
    """A run's final model."""

    folder: Path
    """That holds the weights and run.toml."""
    model: PanModel
    """In inference mode. Experts that their sites kept are copies of the director."""
    run: RunConfig
    metadata: dict[str, Any]
    """Of the whole model, ready for JSON."""

    @classmethod
    def read(cls, place: Path, licence: str | None = None) -> "Source":
        """Read a run's final model.

        Args:
            place: The run folder, its `model/`, or an export that holds a run.toml.
            licence: Of the weights, as it shall stand in the metadata.
        Raises:
            ConfigError: the model's run.toml is absent or does not hold.
            DataError: the run has no final model, or a file of it is damaged.
        """
        folder = model_folder(place)
        written = _read_metadata(folder / "metadata.json")
        model, run = load_model(folder)
        metadata = _describe(folder, model, run, written, licence or LICENCE_UNKNOWN)
        return cls(folder, model.eval(), run, metadata)

    def choose(self, streams: Sequence[str]) -> tuple[str, ...]:
        """The streams named, in their order; all of the run when none is. Raises ConfigError if one is not there."""
        if unknown := [name for name in streams if name not in self.run.streams]:
            raise ConfigError(f"--streams: found {unknown[0]!r}, expected some of {', '.join(self.run.streams)}")
        return tuple(dict.fromkeys(streams)) or tuple(self.run.streams)

    def metadata_of(self, streams: Sequence[str]) -> dict[str, Any]:
        """The metadata of an export that reads these streams only."""
        return self.metadata | {"streams": {name: self.metadata["streams"][name] for name in streams}}

    def copy_to(self, folder: Path) -> float:
        """Copy weights, `run.toml`, whitening, a task's head and `metadata.json` into a folder, and read it back.
        Return the largest difference between its embeddings and the model's. Raises RunError: they differ."""
        head = TASK_FILES if (self.folder / TASK_FILE).exists() else ()
        for name in ("model.safetensors", "run.toml", *((WHITENING,) if self.model.whitening else ()), *head):
            shutil.copyfile(self.folder / name, folder / name)
        write_json(folder / "metadata.json", self.metadata, indent=2)
        batch = batch_of(tuple(self.run.streams), random_inputs(self.run.streams))
        with torch.inference_mode():
            return require_equal(self.model.embed(batch), load_model(folder)[0].eval().embed(batch))


def _read_metadata(path: Path) -> _Written:
    try:
        text = read_text(path, max_bytes=_MAX_METADATA_BYTES)
        return _Written.model_validate(parse_json(text, str(path), max_bytes=_MAX_METADATA_BYTES))
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file, expected what the run wrote of its model") from error
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise DataError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    except (OSError, ValueError, ConfigError) as error:
        raise DataError(f"{path}: not valid JSON ({reason(error)})") from error


def _describe(folder: Path, model: PanModel, run: RunConfig, written: _Written, licence: str) -> dict[str, Any]:
    return {
        **written.model_dump(by_alias=True, exclude={"task", "fine_tuned_on"} if written.task is None else None),
        "licence": licence,
        "epsilon": NOT_PRIVATE if (label := privacy_label(run)) == "none" else label,
        "start": run.start and run.start.sha256,
        "streams": {name: _describe_stream(name, stream) for name, stream in run.streams.items()},
        "pooling": run.features.pooling_text,
        "embedding": model.embedding_size,
        "experts": _describe_experts(model, run.sharing),
        "model-hash": hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest(),
        "panfm": __version__,
        "torch": torch.__version__,
    }


def _describe_stream(name: str, config: StreamConfig) -> dict[str, Any]:
    organ, modality = parse_stream(name)
    return {
        "organ": organ,
        "modality": str(modality),
        "axes": "C, R, A, S" if config.is_volume else "C, height, width",
        **config.model_dump(mode="json", by_alias=True, exclude_none=True),
        "intensity": _intensity_rule(modality if config.is_volume else Modality.PHOTO),
    }


def _describe_experts(model: PanModel, sharing: SharingConfig) -> str:
    if not model.director_experts():
        return "none"
    return "pooled" if is_shared(sharing, EXPERTS) else "kept by their sites; copies of the director in their place"


def sizes_text(sizes: Iterable[float]) -> str:
    """Sizes along axes as text: `8 x 8 x 4`; a dash if there are none."""
    return " x ".join(f"{size:g}" for size in sizes) or "-"


def _intensity_rule(modality: Modality) -> str:
    """Tell in words how grey levels of a modality become 0 to 1."""
    if modality is Modality.CT:
        return f"{HU_WINDOW[0]:g} to {HU_WINDOW[1]:g} HU to 0 to 1, clipped"
    if modality not in (Modality.MR, Modality.PET):
        return f"grey levels {GREY_LEVELS[0]:g} to {GREY_LEVELS[1]:g} to 0 to 1"
    return f"the scan's own {PERCENTILES[0]:g}st to {PERCENTILES[1]:g}th percentile to 0 to 1, clipped"
