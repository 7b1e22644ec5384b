"""ONNX: one input per stream and `present`, any number of subjects, metadata in the file. Needs `panfm[onnx]`."""

import importlib
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from panfm.errors import ConfigError, DataError, reason
from panfm.export.final_model import Source
from panfm.export.network import EmbeddingNetwork, batch_of, random_inputs, require_equal, trace
from panfm.files import write_atomic
from panfm.outputs import check_place, json_text

_PACKAGES = ("onnx", "onnxscript", "onnxruntime")


def write_onnx(source: Source, out: Path, streams: tuple[str, ...]) -> float:
    """Write one new file; returns and raises as `export_run`."""
    if missing := [name for name in _PACKAGES if not find_spec(name)]:
        raise ConfigError(f"--to onnx: {', '.join(missing)} is not installed, expected: pip install 'panfm[onnx]'")
    if out.exists():
        raise DataError(f"{out}: exists already, expected a new file")
    try:
        check_place(out)
    except OSError as error:
        raise DataError(f"{out}: cannot be written ({reason(error)}), expected a file in a folder of yours") from error
    network = EmbeddingNetwork(source.model, streams)
    content = _to_onnx(network, source.metadata_of(streams))
    inputs = random_inputs(network.configs)
    with torch.inference_mode():
        expected = source.model.embed(batch_of(streams, inputs))
    difference = require_equal(expected, _run(content, streams, inputs))
    try:
        write_atomic(out, content)
    except OSError as error:
        raise DataError(f"{out}: cannot be written ({error.strerror})") from error
    return difference


def _to_onnx(network: EmbeddingNetwork, metadata: dict[str, Any]) -> bytes:
    """The file's content. Metadata stand under their own keys; what is not text is JSON."""
    with _quiet():
        program = torch.onnx.export(
            trace(network), input_names=[*network.configs, "present"], output_names=["embedding"], verbose=False
        )
        assert program is not None
        for key, value in metadata.items():
            program.model.metadata_props[key] = value if isinstance(value, str) else json_text(value)
        return bytes(program.model_proto.SerializeToString())


def _run(content: bytes, streams: Sequence[str], inputs: Sequence[Tensor]) -> Tensor:
    session = importlib.import_module("onnxruntime").InferenceSession(content, providers=["CPUExecutionProvider"])
    names = (*streams, "present")
    [embedding] = session.run(None, {name: value.numpy() for name, value in zip(names, inputs, strict=True)})
    return torch.from_numpy(embedding)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the messages of torch's exporter, which are about torch and not about the model."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
