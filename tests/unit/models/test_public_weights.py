"""Features of a public start equal those of `transformers` on random weights, family by family."""

import functools
import hashlib
import json

import pytest
import safetensors.torch
import torch

from panfm.config import load_run
from panfm.data.store import Batch
from panfm.errors import ConfigError, DataError
from panfm.models import build_model
from panfm.models.public_weights import read_public
from panfm.models.warm_start import start_model

SHAPE = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 192,
    "image_size": 32,
    "patch_size": 8,
}
FAMILIES = {
    "vit": ("ViT", {}),
    "vit-mae": ("ViTMAE", {"mask_ratio": 0.0}),
    "dinov2": ("Dinov2", {}),
    "dinov2-registers": ("Dinov2WithRegisters", {"num_register_tokens": 3}),
    "dinov3": ("DINOv3ViT", {"num_register_tokens": 2}),
}
FIELDS = {
    "vit": 'positions = "learned"\nnorm-epsilon = 1e-12\n',
    "vit-mae": 'positions = "learned"\nnorm-epsilon = 1e-12\n',
    "dinov2": 'positions = "learned"\nlayer-scale = true\n',
    "dinov2-registers": 'positions = "learned"\nlayer-scale = true\nregisters = 3\n',
    "dinov3": 'positions = "rotary"\nlayer-scale = true\nregisters = 2\nnorm-epsilon = 1e-5\n',
}
MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
RUN = """
name = "public"
organs = ["eye", "brain"]
[streams]
eye-fundus = { shape = [32, 32], patch = [8, 8], channels = 3 }
eye-oct = { shape = [48, 40], patch = [8, 8] }
[train]
parts = "all"
[model]
tokenizer = "patch"
"""


@functools.cache
def hugging_face(family):
    """A model of `transformers` with random weights, in evaluation."""
    import transformers

    name, more = FAMILIES[family]
    model = getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**SHAPE, **more)).eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data.normal_(0.0, 0.3, generator=generator)
    return model


def saved(family, folder):
    """The tensors of a family's model under the names of its published files."""
    hugging_face(family).save_pretrained(folder)
    return safetensors.torch.load_file(folder / "model.safetensors")


def to_dinov2(state):
    """Written-out names of timm and DINOv2 for those of a published Dinov2Model."""
    renamed = {
        "cls_token": state["embeddings.cls_token"],
        "mask_token": state["embeddings.mask_token"],
        "pos_embed": state["embeddings.position_embeddings"],
        "patch_embed.proj.weight": state["embeddings.patch_embeddings.projection.weight"],
        "patch_embed.proj.bias": state["embeddings.patch_embeddings.projection.bias"],
        "norm.weight": state["layernorm.weight"],
        "norm.bias": state["layernorm.bias"],
    }
    for block in range(2):
        old, new = f"encoder.layer.{block}.", f"blocks.{block}."
        renamed |= {f"{new}ls{number}.gamma": state[f"{old}layer_scale{number}.lambda1"] for number in (1, 2)}
        for kind in ("weight", "bias"):
            parts = [state[f"{old}attention.attention.{part}.{kind}"] for part in ("query", "key", "value")]
            renamed |= {
                f"{new}norm1.{kind}": state[f"{old}norm1.{kind}"],
                f"{new}attn.qkv.{kind}": torch.cat(parts),
                f"{new}attn.proj.{kind}": state[f"{old}attention.output.dense.{kind}"],
                f"{new}norm2.{kind}": state[f"{old}norm2.{kind}"],
                f"{new}mlp.fc1.{kind}": state[f"{old}mlp.fc1.{kind}"],
                f"{new}mlp.fc2.{kind}": state[f"{old}mlp.fc2.{kind}"],
            }
    return renamed


def random_dinov2(*, side=4, width=48, depth=2, patch=8):
    """Random weights under DINOv2's names."""
    shapes = {"cls_token": (1, 1, width), "mask_token": (1, width), "pos_embed": (1, 1 + side**2, width)}
    shapes |= {"patch_embed.proj.weight": (width, 3, patch, patch), "patch_embed.proj.bias": (width,)}
    shapes |= {"norm.weight": (width,), "norm.bias": (width,)}
    layers = {"attn.qkv": (3 * width, width), "attn.proj": (width, width)}
    layers |= {"mlp.fc1": (4 * width, width), "mlp.fc2": (width, 4 * width)}
    for block in (f"blocks.{number}." for number in range(depth)):
        vectors = ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias", "ls1.gamma", "ls2.gamma")
        shapes |= {block + name: (width,) for name in vectors}
        shapes |= {f"{block}{name}.weight": shape for name, shape in layers.items()}
        shapes |= {f"{block}{name}.bias": shape[:1] for name, shape in layers.items()}
    generator = torch.Generator().manual_seed(3)
    return {name: torch.randn(shape, generator=generator) * 0.3 for name, shape in shapes.items()}


@pytest.fixture
def start(tmp_path):
    """Writes a run that starts from a path."""

    def write(path, fields="", *, start="", run=RUN):
        (tmp_path / "run.toml").write_text(f'{run}{fields}[start]\nmodel = "{path}"\n{start}')
        return load_run(tmp_path / "run.toml")

    return write


def images(channels, *shape):
    return torch.rand((2, channels, *shape), generator=torch.Generator().manual_seed(2))


def features(model, stream, pictures):
    """CLS and tokens [B, 1 + T, D] of pictures."""
    encoded = model.encode(
        model.patch_features(Batch(len(pictures), {stream: pictures}, {stream: torch.arange(len(pictures))}))
    )
    return torch.cat([encoded.cls[:, None], encoded.tokens], dim=1)


def expected(family, pixels):
    """CLS and tokens of `transformers` for standardised pixels; registers left out."""
    if family == "vit-mae":  # in the order of the patches, none masked
        noise = torch.arange(pixels.shape[2] * pixels.shape[3] // 64).expand(len(pixels), -1) / 1000
        hidden = hugging_face(family)(pixels, noise=noise, interpolate_pos_encoding=True).last_hidden_state
    elif family == "vit":
        hidden = hugging_face(family)(pixels, interpolate_pos_encoding=True).last_hidden_state
    else:
        hidden = hugging_face(family)(pixels).last_hidden_state
    registers = FAMILIES[family][1].get("num_register_tokens", 0)
    return torch.cat([hidden[:, :1], hidden[:, 1 + registers :]], dim=1)


def standardised(pictures, mean, std):
    return (pictures.expand(-1, 3, -1, -1) - mean.view(3, 1, 1)) / std.view(3, 1, 1)


@pytest.mark.slow  # `transformers` takes seconds to import
@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_features_are_those_of_transformers(family, tmp_path, start):
    """Colour at the public grid, grey at another; pixels standardised as the folder tells, or the family has it."""
    folder = tmp_path / "hf"
    saved(family, folder)
    mean, std = (MEAN, STD) if family != "vit" else (torch.full((3,), 0.5), torch.full((3,), 0.5))
    if family == "dinov2":
        mean, std = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.3, 0.4, 0.5])
        told = {"image_mean": mean.tolist(), "image_std": std.tolist()}
        (folder / "preprocessor_config.json").write_text(json.dumps(told))
    model = start_model(start(folder, FIELDS[family]))
    for stream, pictures in (("eye-fundus", images(3, 32, 32)), ("eye-oct", images(1, 48, 40))):
        wanted = expected(family, standardised(pictures, mean, std))
        torch.testing.assert_close(features(model, stream, pictures), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@torch.no_grad()
def test_names_of_dinov2_give_the_features_of_transformers(tmp_path, start):
    torch.save(to_dinov2(saved("dinov2", tmp_path / "hf")), tmp_path / "w.pth")
    model = start_model(start(tmp_path / "w.pth", FIELDS["dinov2"]))
    wanted = expected("dinov2", standardised(images(3, 32, 32), MEAN, STD))
    torch.testing.assert_close(features(model, "eye-fundus", images(3, 32, 32)), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@torch.no_grad()
def test_names_of_timm_give_the_features_of_transformers(tmp_path, start):
    """A ViT without layer scale, whose pixels and norms' epsilon a state dict does not tell."""
    state = saved("vit", tmp_path / "hf")
    for block in range(2):
        old, new = f"encoder.layer.{block}.", f"blocks.{block}."
        for kind in ("weight", "bias"):
            parts = [state.pop(f"{old}attention.attention.{part}.{kind}") for part in ("query", "key", "value")]
            state |= {
                f"{new}norm1.{kind}": state.pop(f"{old}layernorm_before.{kind}"),
                f"{new}attn.qkv.{kind}": torch.cat(parts),
                f"{new}attn.proj.{kind}": state.pop(f"{old}attention.output.dense.{kind}"),
                f"{new}norm2.{kind}": state.pop(f"{old}layernorm_after.{kind}"),
                f"{new}mlp.fc1.{kind}": state.pop(f"{old}intermediate.dense.{kind}"),
                f"{new}mlp.fc2.{kind}": state.pop(f"{old}output.dense.{kind}"),
            }
    for kind in ("weight", "bias"):
        state[f"norm.{kind}"] = state.pop(f"layernorm.{kind}")
        state[f"patch_embed.proj.{kind}"] = state.pop(f"embeddings.patch_embeddings.projection.{kind}")
    state |= {"cls_token": state.pop("embeddings.cls_token"), "pos_embed": state.pop("embeddings.position_embeddings")}
    torch.save(state, tmp_path / "timm.pth")
    model = start_model(start(tmp_path / "timm.pth", 'positions = "learned"\n', start='normalisation = "half"\n'))
    half = torch.full((3,), 0.5)
    wanted = expected("vit", standardised(images(3, 32, 32), half, half))
    torch.testing.assert_close(features(model, "eye-fundus", images(3, 32, 32)), wanted, rtol=1e-4, atol=1e-4)


def test_all_kinds_of_files_are_read_alike(tmp_path, start):
    state = random_dinov2()
    safetensors.torch.save_file(state, tmp_path / "w.safetensors")
    torch.save(state, tmp_path / "w.pth")
    torch.save({"model": state | {"head.weight": torch.zeros(2, 48)}}, tmp_path / "w.bin")
    found = []
    for file in ("w.safetensors", "w.pth", "w.bin"):
        run = start(tmp_path / file, FIELDS["dinov2"])
        assert run.start.public
        assert run.start.sha256 == hashlib.sha256((tmp_path / file).read_bytes()).hexdigest()
        found.append(start_model(run).state_dict())
    assert all(torch.equal(one, found[0][name]) for other in found[1:] for name, one in other.items())
    seeded = build_model(run).state_dict()
    assert torch.equal(found[0]["heads.predictor.out.weight"], seeded["heads.predictor.out.weight"])
    cls = state["cls_token"].flatten() + state["pos_embed"][0, 0]
    assert torch.equal(found[0]["backbone.cls"], cls)
    assert torch.equal(found[0]["backbone.blocks.1.attention.qkv.weight"], state["blocks.1.attn.qkv.weight"])
    assert torch.equal(found[0]["backbone.blocks.1.mlp.2.bias"], state["blocks.1.mlp.fc2.bias"])
    assert torch.equal(found[0]["backbone.blocks.0.scale2.weight"], state["blocks.0.ls2.gamma"])
    assert torch.equal(found[0]["streams.eye-fundus.position"], state["pos_embed"][0, 1:])


def test_director_and_experts_start_as_the_public_mlps(tmp_path, start):
    state = random_dinov2()
    torch.save(state, tmp_path / "w.pth")
    fields = f'backbone = "director-experts"\nexperts.count = 2\nexperts.active = 1\n{FIELDS["dinov2"]}'
    model = start_model(start(tmp_path / "w.pth", fields))
    for block in range(2):
        layer = model.get_submodule(f"backbone.blocks.{block}.mlp")
        for expert in range(2):
            assert torch.equal(layer.experts.weight_in[expert], state[f"blocks.{block}.mlp.fc1.weight"])
            assert torch.equal(layer.experts.bias_out[expert], state[f"blocks.{block}.mlp.fc2.bias"])
        assert torch.equal(layer.director[0].weight, state[f"blocks.{block}.mlp.fc1.weight"])


def test_a_model_that_does_not_fit_is_told_what_to_set(tmp_path, start):
    torch.save(random_dinov2(), tmp_path / "w.pth")
    wrong = 'size = "tiny"\nhidden-multiple = 2\nregisters = 1\n'
    remedy = (
        'dinov2 weights fit another run, set model.size = "nano", model.hidden-multiple = 4, model.positions = '
        '"learned", model.registers = 0, model.layer-scale = true'
    )
    with pytest.raises(DataError, match=f"^start.model: {remedy}$"):
        start_model(start(tmp_path / "w.pth", wrong))
    statistics = start(tmp_path / "w.pth", FIELDS["dinov2"], run=RUN.replace('"patch"', '"statistics"'))
    with pytest.raises(DataError, match=r'set model\.tokenizer = "patch"$'):
        start_model(statistics)
    torch.save(random_dinov2(width=40), tmp_path / "w.pth")
    with pytest.raises(DataError, match=r"an encoder of 40 x 2, expected width x depth x heads of nano 48 x 2 x 3"):
        start_model(start(tmp_path / "w.pth", FIELDS["dinov2"]))


def test_pixels_are_not_standardised_twice(tmp_path, start):
    torch.save(random_dinov2(), tmp_path / "w.pth")
    run = start(tmp_path / "w.pth", FIELDS["dinov2"])
    name, stream = next(iter(run.streams.items()))
    numbers = (0.5,) * stream.channels
    scaled = stream.model_copy(update={"input_centre": numbers, "input_scale": numbers})
    with pytest.raises(DataError, match=f"set no input-centre and input-scale of {name}: the patch embedding"):
        start_model(run.model_copy(update={"streams": run.streams | {name: scaled}}))


def test_which_part_of_public_weights_is_trained_must_be_said(tmp_path, start):
    torch.save(random_dinov2(), tmp_path / "w.pth")
    with pytest.raises(ConfigError, match=r"^train\.parts: missing, expected the part of public weights to train"):
        start(tmp_path / "w.pth", FIELDS["dinov2"], run=RUN.replace('parts = "all"', ""))


def test_plain_timm_needs_its_pixels_declared(tmp_path, start):
    state = {name: value for name, value in random_dinov2().items() if ".ls" not in name}
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(DataError, match=r'timm weights fit another run, set start\.normalisation = "imagenet", "half"'):
        start_model(start(tmp_path / "w.pth", 'positions = "learned"\n'))
    start_model(start(tmp_path / "w.pth", 'positions = "learned"\n', start='normalisation = "none"\n'))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (
            lambda state: state | {"blocks.0.mlp.w12.weight": torch.zeros(2)},
            "holds blocks.0.mlp.w12.weight, which no ViT",
        ),
        (lambda state: state | {"fc_norm.weight": torch.zeros(2)}, "holds fc_norm.weight, which no ViT"),
        (lambda state: {k: v for k, v in state.items() if k != "norm.bias"}, "holds no norm.bias"),
        (
            lambda state: {k: v for k, v in state.items() if k != "blocks.1.mlp.fc1.bias"},
            "holds no backbone.blocks.1.mlp",
        ),
        (lambda state: state | {"pos_embed": torch.zeros(1, 13, 48)}, "13 positions, expected those of a square grid"),
        (lambda state: state | {"norm.bias": torch.full((48,), torch.nan)}, "backbone.norm.bias holds NaN or inf"),
        (lambda state: state | {"norm.bias": torch.zeros(47)}, r"backbone.norm.bias is torch.float32 \[47\], expected"),
        (lambda state: [1, 2], "holds no state dict"),
        (lambda state: state | {"patch_embed.proj.weight": torch.zeros(())}, "is no encoder of a ViT as its family"),
        (lambda state: state | {"pos_embed": torch.zeros(())}, "is no encoder of a ViT as its family"),
    ],
)
def test_what_is_no_encoder_is_refused(change, complaint, tmp_path, start):
    torch.save(change(random_dinov2()), tmp_path / "w.pth")
    with pytest.raises(DataError, match=f"^start.model: .*{complaint}"):
        start_model(start(tmp_path / "w.pth", FIELDS["dinov2"]))


def test_a_file_that_runs_code_is_not_read(tmp_path, start):
    class Evil:
        def __reduce__(self):
            return (print, ("read",))

    torch.save({"norm.bias": Evil()}, tmp_path / "w.pth")
    with pytest.raises(DataError, match="is no weights file of safetensors or torch"):
        start_model(start(tmp_path / "w.pth"))
    (tmp_path / "w.safetensors").write_bytes(b"none")
    with pytest.raises(DataError, match="is no weights file of safetensors or torch"):
        start_model(start(tmp_path / "w.safetensors"))


@pytest.mark.parametrize("entry", ['"layer_norm_eps": "small"', '"pretrained_cfg": 1'])
def test_a_faulty_config_of_a_folder_is_one_line(entry, tmp_path, start):
    folder = tmp_path / "vit"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "dinov2", ' + entry + "}")
    safetensors.torch.save_file(random_dinov2(), folder / "model.safetensors")
    with pytest.raises(DataError, match=r"^start.model: \S+ is no encoder of a ViT as its family publishes it \("):
        start_model(start(folder, FIELDS["dinov2"]))


def test_a_folder_of_an_unknown_model_is_refused(tmp_path, start):
    folder = tmp_path / "swin"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "swin"}')
    safetensors.torch.save_file(random_dinov2(), folder / "model.safetensors")
    with pytest.raises(
        DataError, match=r"^start.model: model_type 'swin' in config.json, expected vit, vit_mae, dinov2"
    ):
        start_model(start(folder))


def test_keys_of_dinov3_as_published_have_no_bias(tmp_path):
    """A bias beside a mask: NaN where the mask is 0, as in Meta's files."""
    state = {name: value for name, value in random_dinov2().items() if name != "pos_embed"}
    for block in range(2):
        state[f"blocks.{block}.attn.qkv.bias"][48:96] = torch.nan
        mask = torch.ones(144)
        mask[48:96] = 0.0
        state[f"blocks.{block}.attn.qkv.bias_mask"] = mask
    torch.save(
        state | {"storage_tokens": torch.ones(1, 4, 48), "rope_embed.periods": torch.ones(4)}, tmp_path / "d.pth"
    )
    public = read_public(tmp_path / "d.pth")
    assert (public.family, public.epsilon, public.positions) == ("dinov3", 1e-5, None)
    assert public.backbone["backbone.registers"].shape == (4, 48)
    assert not public.backbone["backbone.blocks.1.attention.qkv.bias"][48:96].any()
    assert all(value.isfinite().all() for value in public.backbone.values())
