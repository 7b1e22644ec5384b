"""Finds the model that a user names: by the run folder or by the folder of the weights. Imports no torch."""

from pathlib import Path

from panfm.errors import DataError


def model_folder(place: Path) -> Path:
    """Folder that holds `model.safetensors` and `run.toml`, given a run folder, its `model/`, or an export.

    Args:
        place: RUN or a model's folder, wherever a command or `panfm.load` asks for a model.
    Raises:
        DataError: the path is no folder, or the run has no final model.
    """
    if (place / "model").is_dir():
        return place / "model"
    if not place.is_dir():
        raise DataError(f"{place}: no such folder, expected the folder of a finished run, or of a model")
    if (place / "config.json").exists() and not (place / "run.toml").exists():
        expected = "the folder of a finished run, or an export of the whole model"
        raise DataError(f"{place}: holds one stream's encoder for timm or transformers, expected {expected}")
    if (place / "rounds.jsonl").exists() or not (place / "run.toml").exists():
        raise DataError(f"{place}: found no model/, expected the folder of a finished run")
    return place
