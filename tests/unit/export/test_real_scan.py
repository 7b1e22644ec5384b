"""One real hippocampus through every export. The images lie outside the repository, at $PANFM_REAL_DATA."""

import os
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

from panfm.config import parse_run
from panfm.data.store import Batch
from panfm.evaluate.embed import load_model
from panfm.export.formats import export_run
from panfm.export.monai_bundle import ReadStreams
from panfm.export.monai_network import Embedder

REAL = os.environ.get("PANFM_REAL_DATA")
STREAM = "hippocampus-mr"
RUN = """
name = "real"
organs = ["hippocampus"]
[streams]
hippocampus-mr = { spacing-mm = [2.0, 2.0, 2.0], shape = [20, 28, 20], patch = [10, 14, 10] }
"""


@pytest.mark.slow
@pytest.mark.skipif(not REAL, reason="PANFM_REAL_DATA is not set: no real images")
def test_a_real_scan_is_embedded_alike_everywhere(tmp_path, write_run):
    run_folder = write_run(parse_run(RUN))
    scan = sorted(Path(str(REAL)).glob("hippocampus/images/*.nii.gz"))[0]
    image = ReadStreams(str(run_folder / "model" / "run.toml"), [STREAM])({STREAM: str(scan)})[STREAM][None]
    batch = Batch(1, {STREAM: image}, {STREAM: torch.tensor([0])})
    with torch.inference_mode():
        expected = load_model(run_folder / "model")[0].eval().embed(batch)
        for to in ("safetensors", "dense-vit"):
            export_run(run_folder, to, tmp_path / to)
            np.testing.assert_allclose(load_model(tmp_path / to)[0].eval().embed(batch), expected, atol=1e-5)
        export_run(run_folder, "monai-bundle", tmp_path / "bundle")
        network = Embedder(str(tmp_path / "bundle" / "models" / "model.pt2"), {STREAM: image.shape[1:]})
        np.testing.assert_allclose(network(image), expected, atol=1e-5)
    export_run(run_folder, "onnx", tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    [found] = session.run(None, {STREAM: image.numpy(), "present": np.ones((1, 1), dtype=bool)})
    np.testing.assert_allclose(found, expected, atol=1e-5)
