"""timm's names and features, against a forward pass written from its code, and against timm itself where it is there.

.venv/bin/python -m pip install --no-deps --target .venv/timm timm torchvision
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional

from panfm.config import parse_run
from panfm.data.store import Batch
from panfm.errors import ConfigError
from panfm.evaluate.embed import load_model
from panfm.export.formats import export_run
from panfm.models.public_weights import read_public

RUN = """
name = "small"
seed = 7
[streams]
eye-fundus = { shape = [8, 8], patch = [4, 4], channels = 3 }
chest-xray = { shape = [12, 12], patch = [4, 4] }
brain-mr = { spacing-mm = [2.0, 2.0, 2.0], shape = [8, 8, 4], patch = [4, 4, 4] }
skin-photo = { shape = [8, 12], patch = [4, 4] }
[train]
rounds = 2
local-steps = 4
batch-size = 6
"""
TIMM = Path(sys.prefix) / "timm"
LAYERS = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
PATCH = '[model]\ntokenizer = "patch"\n'
MODELS = {
    "fixed": PATCH,
    "learned": PATCH + 'positions = "learned"\nregisters = 2\nlayer-scale = true\nhidden-multiple = 2\n',
    "experts": PATCH + 'backbone = "director-experts"\n',
    "lora": PATCH + '[train.parts]\nkind = "lora"\nrank = 2\nblocks = 1\n',
}


@pytest.fixture
def export(tmp_path, write_run):
    """Exports one stream of a run -> (folder, images, CLS and patches of the run's model)."""

    def make(model, stream="eye-fundus", to="timm", run=RUN, name="out"):
        folder = write_run(parse_run(run + model))
        out = tmp_path / name
        assert export_run(folder, to, out, streams=[stream]) <= 1e-5
        network, description = load_model(folder / "model")
        config = description.streams[stream]
        images = torch.rand((3, config.channels, *config.shape), generator=torch.Generator().manual_seed(1))
        batch = Batch(3, {stream: images}, {stream: torch.arange(3)})
        with torch.inference_mode():
            encoded = network.eval().encode(network.patch_features(batch), route="director")
        return out, images, torch.cat([encoded.cls[:, None], encoded.tokens], dim=1)

    return make


def timm_forward(state, images, arguments):
    """`forward_features` of timm's VisionTransformer (timm 1.0, vision_transformer.py), for a class token and
    `no_embed_class`, written with modules of torch."""
    width, heads, patch = arguments["embed_dim"], arguments["num_heads"], arguments["patch_size"]
    projection = nn.Conv2d(arguments["in_chans"], width, kernel_size=patch, stride=patch)
    projection.load_state_dict({kind: state[f"patch_embed.proj.{kind}"] for kind in ("weight", "bias")})
    x = projection(images).flatten(2).transpose(1, 2)
    x = x + state["pos_embed"]
    to_cat = [state["cls_token"].expand(x.shape[0], -1, -1)]
    if arguments["reg_tokens"]:
        to_cat.append(state["reg_token"].expand(x.shape[0], -1, -1))
    x = torch.cat([*to_cat, x], dim=1)

    def norm(x, name):
        layer = nn.LayerNorm(width, eps=1e-6)
        layer.load_state_dict({kind: state[f"{name}.{kind}"] for kind in ("weight", "bias")})
        return layer(x)

    def linear(x, name):
        return functional.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def attention(x, name):
        size, length, _ = x.shape
        qkv = linear(x, f"{name}.qkv").reshape(size, length, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        weights = (q * (width // heads) ** -0.5 @ k.transpose(-2, -1)).softmax(dim=-1)
        return linear((weights @ v).transpose(1, 2).reshape(size, length, width), f"{name}.proj")

    for number in range(arguments["depth"]):
        block = f"blocks.{number}"
        scales = [state.get(f"{block}.ls{part}.gamma", torch.ones(width)) for part in (1, 2)]
        x = x + scales[0] * attention(norm(x, f"{block}.norm1"), f"{block}.attn")
        hidden = functional.gelu(linear(norm(x, f"{block}.norm2"), f"{block}.mlp.fc1"))
        x = x + scales[1] * linear(hidden, f"{block}.mlp.fc2")
    return norm(x, "norm")


def timm_names(arguments):
    """Names of the state dict of timm's VisionTransformer without a head, written out from timm's modules."""
    names = {"cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias", "norm.weight", "norm.bias"}
    names |= {"reg_token"} if arguments["reg_tokens"] else set()
    for number in range(arguments["depth"]):
        names |= {f"blocks.{number}.{layer}.{kind}" for layer in LAYERS for kind in ("weight", "bias")}
        if arguments["init_values"] is not None:
            names |= {f"blocks.{number}.ls{part}.gamma" for part in (1, 2)}
    return names


def without_registers(tokens, arguments):
    return torch.cat([tokens[:, :1], tokens[:, 1 + arguments["reg_tokens"] :]], dim=1)


CASES = [*((model, "eye-fundus") for model in MODELS), ("learned", "chest-xray")]


@pytest.mark.parametrize(("model", "stream"), CASES)
def test_timms_forward_gives_the_models_cls_and_patches(export, model, stream):
    out, images, expected = export(MODELS[model], stream)
    arguments = json.loads((out / "metadata.json").read_text())["timm"]["arguments"]
    state = load_file(out / "model.safetensors")
    assert set(state) == timm_names(arguments)
    with torch.inference_mode():
        tokens = timm_forward(state, images, arguments)
    torch.testing.assert_close(without_registers(tokens, arguments), expected, atol=1e-5, rtol=0)


def test_constants_of_the_inputs_are_in_the_patch_embedding(export):
    constants = "channels = 3, input-centre = [0.5, 0.4, 0.3], input-scale = [4.0, 5.0, 6.0] }"
    out, images, expected = export(MODELS["fixed"], run=RUN.replace("channels = 3 }", constants))
    arguments = json.loads((out / "metadata.json").read_text())["timm"]["arguments"]
    with torch.inference_mode():
        tokens = timm_forward(load_file(out / "model.safetensors"), images, arguments)
    torch.testing.assert_close(tokens, expected, atol=1e-5, rtol=0)


def test_the_folder_is_a_public_start_of_another_run(export):
    out, _, _ = export(MODELS["learned"])
    public = read_public(out)
    assert (public.family, public.normalisation) == ("timm", ((0.0,) * 3, (1.0,) * 3))
    assert public.model_fields()["registers"] == 2
    config = json.loads((out / "config.json").read_text())
    assert (config["model_args"]["img_size"], config["num_classes"]) == ([8, 8], 0)


@pytest.mark.parametrize("to", ["timm", "huggingface"])
@pytest.mark.parametrize(
    ("model", "streams", "complaint"),
    [
        (PATCH, ["brain-mr"], r"found brain-mr of \[8, 8, 4\].*expected square pictures and patches"),
        (PATCH, ["skin-photo"], r"found skin-photo of \[8, 12\], patch \[4, 4\], expected square pictures and patches"),
        ("", ["eye-fundus"], r'found model.tokenizer = "statistics", expected "patch"'),
        (PATCH, ["eye-fundus", "chest-xray"], "--streams: found 2, expected one stream for"),
        (PATCH, ["liver-mr"], "--streams: found 'liver-mr', expected some of"),
    ],
)
def test_what_has_no_such_form_is_one_line(tmp_path, write_run, to, model, streams, complaint):
    folder = write_run(parse_run(RUN + model))
    with pytest.raises(ConfigError, match=complaint):
        export_run(folder, to, tmp_path / "out", streams=streams)
    assert not (tmp_path / "out").exists()


def test_timm_needs_a_stream(tmp_path, write_run):
    with pytest.raises(ConfigError, match="--streams: found 0, expected one stream for timm"):
        export_run(write_run(parse_run(RUN + PATCH)), "timm", tmp_path / "out")


@pytest.mark.slow  # timm takes seconds to import
@pytest.mark.skipif(not TIMM.is_dir(), reason=f"no timm in {TIMM}")
def test_timm_loads_the_exports_strictly_and_gives_the_same_features(export, tmp_path):
    folders, expected = [], []
    for number, (model, stream) in enumerate(CASES):
        out, images, tokens = export(MODELS[model], stream, name=f"out-{number}")
        torch.save(images, out / "images.pt")
        folders.append(out)
        expected.append(tokens)
        shutil.rmtree(tmp_path / "run")
    program = Path(__file__).with_name("timm_tokens.py")
    subprocess.run([sys.executable, program, TIMM, *folders], check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    for folder, tokens in zip(folders, expected, strict=True):
        by_state, from_folder = torch.load(folder / "tokens.pt", weights_only=True)
        torch.testing.assert_close(by_state, tokens, atol=1e-5, rtol=0)
        torch.testing.assert_close(from_folder, tokens, atol=1e-5, rtol=0)
