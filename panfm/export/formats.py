"""Exports the final model of a run folder in one of several formats."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from panfm.errors import ConfigError
from panfm.export.dense_vit import write_dense_vit
from panfm.export.monai_bundle import write_monai_bundle
from panfm.export.onnx import write_onnx
from panfm.export.safetensors import write_safetensors
from panfm.export.source import Source

_WHOLE: Mapping[str, Callable[[Source, Path], float]] = {
    "safetensors": write_safetensors,
    "dense-vit": write_dense_vit,
}
_BY_STREAM: Mapping[str, Callable[[Source, Path, tuple[str, ...]], float]] = {
    "monai-bundle": write_monai_bundle,
    "onnx": write_onnx,
}
FORMATS = (*_WHOLE, *_BY_STREAM)


def export_run(
    run_folder: Path, to: str, out: Path, *, streams: Sequence[str] = (), licence: str | None = None
) -> float:
    """Export the final model of a run.

    Guarantees:
        whole: `out` appears with all its content, or not at all; nothing is overwritten.
        equal: what was written was read back, and embeds random images as the run's model does.
    Args:
        to: One of FORMATS.
        out: New folder; new file for onnx.
        streams: Of `monai-bundle` and `onnx`: those that can be fed, in the order of the inputs; all when empty.
        licence: Of the weights.
    Returns:
        The largest difference between the embeddings of the export and of the run's model.
    Raises:
        ConfigError: an argument does not hold, or packages are missing.
        DataError: the run folder does not hold, or `out` exists or cannot be written.
        RunError: the export differs from the model.
    """
    if to in _WHOLE:
        if streams:
            raise ConfigError(f"--streams: goes with {' and '.join(_BY_STREAM)}; {to} always holds all streams")
        return _WHOLE[to](Source.read(run_folder, licence), out)
    if to not in _BY_STREAM:
        raise ConfigError(f"--to: found {to!r}, expected one of {', '.join(FORMATS)}")
    source = Source.read(run_folder, licence)
    return _BY_STREAM[to](source, out, source.choose(streams))
