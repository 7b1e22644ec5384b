import json
import shutil

import numpy as np
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from panfm.cli import main
from panfm.config import load_run, parse_run
from panfm.errors import PanfmError
from panfm.evaluate.embed import load_model, read_features
from panfm.export import network as comparison
from panfm.export.formats import FORMATS, export_run
from panfm.export.monai_bundle import ReadStreams
from panfm.export.monai_network import Embedder
from panfm.export.network import batch_of, random_inputs
from panfm.models import build_model
from panfm.models.whitening import Whitening

DEX = '[model]\nbackbone = "director-experts"\n'
POOLED = DEX + '[sharing]\nexperts = "pooled"\n[sharing.groups]\ndirector = { mean = "median" }\n'
PRIVATE = """
[masking]
policy = "random"
[objective]
standardise = {standardise}
[patient-dp]
epsilon = 8.0
delta = 1e-5
public-subjects = 1000
noise-multiplier = 1.0
sample-rate = 0.1
acknowledge-broken-guarantee = true
"""
SLOW_ONNX = pytest.param("onnx", marks=pytest.mark.slow)
SLOW_BUNDLE = pytest.param("monai-bundle", marks=pytest.mark.slow)
LONG_ONNX = pytest.param("onnx", marks=[pytest.mark.slow, pytest.mark.long])


def own_embedding(run_folder, streams, *, route="experts"):
    model, run = load_model(run_folder / "model")
    inputs = random_inputs({name: run.streams[name] for name in streams})
    with torch.inference_mode():
        return inputs, model.eval().embed(batch_of(streams, inputs), route=route)


def panfm(*arguments):
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


@pytest.mark.parametrize("backbone", ["", DEX, POOLED])
def test_safetensors_are_the_runs_own_bytes(tmp_path, make_run, write_run, backbone):
    run_folder, out = write_run(make_run(backbone)), tmp_path / "out"
    assert export_run(run_folder, "safetensors", out) == 0.0
    for name in ("model.safetensors", "run.toml"):
        assert (out / name).read_bytes() == (run_folder / "model" / name).read_bytes()
    assert {path.name for path in out.iterdir()} == {"model.safetensors", "run.toml", "metadata.json"}


def test_safetensors_are_read_by_panfm_embed(tmp_path, make_run, write_run, write_site):
    site = write_site(tmp_path / "site", "clinic", ("brain",))
    run_folder = write_run(make_run())
    assert panfm("export", run_folder, "--to", "safetensors", "--out", tmp_path / "out").exit_code == 0
    tables = []
    for folder in (tmp_path / "out", run_folder / "model"):
        assert panfm("embed", folder, site, "--out", tmp_path / "features.npz").exit_code == 0
        tables.append(read_features(tmp_path / "features.npz"))
    np.testing.assert_array_equal(tables[0].features, tables[1].features)
    metadata = json.loads((tmp_path / "out" / "metadata.json").read_text())
    assert tables[0].model_hash == metadata["model-hash"]


@pytest.mark.parametrize("backbone", ["", DEX, POOLED])
def test_dense_vit_goes_through_the_directors(tmp_path, make_run, write_run, backbone):
    run_folder, out = write_run(make_run(backbone)), tmp_path / "out"
    assert export_run(run_folder, "dense-vit", out) <= 1e-5
    run = load_run(out / "run.toml")
    assert run.model.backbone == "dense"
    dense = build_model(run)
    dense.load_state_dict(load_file(out / "model.safetensors"), strict=True)
    streams = tuple(run.streams)
    inputs, expected = own_embedding(run_folder, streams, route="director")
    with torch.inference_mode():
        torch.testing.assert_close(dense.eval().embed(batch_of(streams, inputs)), expected, atol=1e-5, rtol=0)
    if backbone == POOLED:  # its experts are not its directors, or the test could not fail
        assert (own_embedding(run_folder, streams)[1] - expected).abs().max() > 1e-3


def whitening_of(run):
    """A whitening of random numbers for a run's model."""
    model, generator = build_model(run), torch.Generator().manual_seed(0)
    size = model.embedding_size
    matrix = torch.randn(3, size, size, generator=generator) / size**0.5
    return Whitening(torch.randn(3, size, generator=generator), torch.full((3, size), 2.0), matrix + matrix.mT)


@pytest.mark.parametrize("to", ["safetensors", "dense-vit", SLOW_BUNDLE, SLOW_ONNX])
@pytest.mark.parametrize("pooling", ["layers", "per-stream"])
def test_exports_pool_and_whiten_as_the_model(tmp_path, make_run, write_run, to, pooling):
    run = make_run(f'[features]\npooling = "{pooling}"\n')
    run_folder, out = write_run(run, whitening_of(run)), tmp_path / "out"
    streams = ("eye-fundus", "brain-mr") if to in ("monai-bundle", "onnx") else ()
    assert export_run(run_folder, to, out, streams=streams) < 1e-3
    told = json.loads((run_folder / "model" / "metadata.json").read_text())["whitening"]
    if to == "onnx":
        session = onnxruntime.InferenceSession(out, providers=["CPUExecutionProvider"])
        inputs, expected = own_embedding(run_folder, streams)
        fed = {name: value.numpy() for name, value in zip((*streams, "present"), inputs, strict=True)}
        np.testing.assert_allclose(session.run(None, fed)[0], expected, atol=1e-4)
        assert session.get_modelmeta().custom_metadata_map["whitening"] == told
        return
    path = out / "configs" / "metadata.json" if to == "monai-bundle" else out / "metadata.json"
    metadata = json.loads(path.read_text())
    metadata = metadata["panfm"] if to == "monai-bundle" else metadata
    assert (metadata["pooling"], metadata["whitening"]) == (pooling, told)
    assert metadata["embedding"] == build_model(run).embedding_size
    if to != "monai-bundle":
        assert torch.equal(load_model(out)[0].whitening.matrix, whitening_of(run).matrix)


def test_a_whitening_of_experts_has_no_dense_export(tmp_path, make_run, write_run):
    run = make_run(DEX)
    with pytest.raises(PanfmError, match="--to dense-vit: the whitening is of embeddings by way of the experts"):
        export_run(write_run(run, whitening_of(run)), "dense-vit", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_metadata_tell_what_the_model_is(tmp_path, make_run, write_run):
    export_run(write_run(make_run(DEX)), "safetensors", tmp_path / "out", licence="CC-BY-4.0")
    metadata = json.loads((tmp_path / "out" / "metadata.json").read_text())
    assert metadata["sites"] == ["one", "two"]
    assert (metadata["rounds"], metadata["run-id"], metadata["embedding"]) == (2, "small-1", 48)
    assert (metadata["licence"], metadata["epsilon"]) == ("CC-BY-4.0", "none: not private")
    assert metadata["experts"] == "kept by their sites; copies of the director in their place"
    assert metadata["streams"]["heart-ct"] == {
        "organ": "heart",
        "modality": "ct",
        "axes": "C, R, A, S",
        "shape": [8, 4, 4],
        "patch": [4, 4, 4],
        "spacing-mm": [2.0, 2.0, 2.0],
        "channels": 1,
        "intensity": "-200 to 400 HU to 0 to 1, clipped",
    }
    assert metadata["streams"]["brain-mr"]["intensity"].startswith("the scan's own 1st to 99th percentile")
    assert metadata["streams"]["eye-fundus"]["intensity"] == "grey levels 0 to 255 to 0 to 1"


@pytest.mark.parametrize(
    ("standardise", "claim"),
    [("true", "noise only, no DP claim"), ("false", "(8, 1e-05)-DP per patient of one site, add-or-remove-one")],
)
def test_metadata_claim_no_more_privacy_than_there_is(tmp_path, make_run, write_run, standardise, claim):
    export_run(write_run(make_run(PRIVATE.format(standardise=standardise))), "safetensors", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "metadata.json").read_text())["epsilon"] == claim


@pytest.mark.slow
def test_monai_bundle_loads_and_embeds(tmp_path, make_run, write_run, write_site):
    run_folder, out = write_run(make_run(DEX)), tmp_path / "out"
    streams = ("heart-ct", "brain-mr")
    assert export_run(run_folder, "monai-bundle", out, streams=streams) <= 1e-5
    config = json.loads((out / "configs" / "inference.json").read_text())
    network = Embedder(str(out / "models" / "model.pt2"), config["network_def"]["shapes"]).eval()
    (heart, brain, present), expected = own_embedding(run_folder, streams)
    with torch.inference_mode():
        found = network(heart, present, **{"brain-mr": brain})
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(network(heart[:1]), network(heart[:1], torch.tensor([[True, False]])))
    with pytest.raises(ValueError, match="expected some of heart-ct, brain-mr"):
        network(heart, **{"liver-mr": brain})
    with pytest.raises(ValueError, match="expected some of"):
        network()
    weights = torch.load(out / "models" / "model.pt", weights_only=True)
    network.load_state_dict(weights, strict=True)
    metadata = json.loads((out / "configs" / "metadata.json").read_text())
    assert list(metadata["network_data_format"]["inputs"]) == ["image", "brain-mr", "present"]
    assert list(metadata["panfm"]["streams"]) == list(streams)
    assert (out / "LICENSE").read_text().startswith("Weights (models/): not stated")
    assert "| `heart-ct` | 1 | 8 x 4 x 4 | 2 x 2 x 2 |" in (out / "docs" / "README.md").read_text()


@pytest.mark.slow
def test_a_bundle_reads_scans_as_the_sites_do(tmp_path, make_run, write_run, write_site):
    site = write_site(tmp_path / "site", "clinic", ("brain",))
    run_folder = write_run(make_run())
    read = ReadStreams(str(run_folder / "model" / "run.toml"), ("heart-ct", "brain-mr"))
    item = read({"brain-mr": str(site / "clinic-0-brain.nii.gz"), "subject": "p0"})
    assert item["present"].tolist() == [False, True]
    assert not item["heart-ct"].any()
    assert panfm("embed", run_folder / "model", site, "--out", tmp_path / "features.npz").exit_code == 0
    export_run(run_folder, "monai-bundle", tmp_path / "out", streams=["brain-mr"])
    network = Embedder(str(tmp_path / "out" / "models" / "model.pt2"), {"brain-mr": [1, 8, 8, 4]})
    with torch.inference_mode():
        found = network(item["brain-mr"][None])
    np.testing.assert_allclose(found, read_features(tmp_path / "features.npz").features[:1], atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("backbone", [pytest.param("", marks=pytest.mark.long), POOLED])
def test_onnx_embeds_any_number_of_patients(tmp_path, make_run, write_run, backbone):
    run_folder, out, streams = write_run(make_run(backbone)), tmp_path / "model.onnx", ("eye-fundus", "brain-mr")
    assert export_run(run_folder, "onnx", out, streams=streams) <= 1e-5
    session = onnxruntime.InferenceSession(out, providers=["CPUExecutionProvider"])
    inputs, expected = own_embedding(run_folder, streams)
    for rows in (slice(None), slice(2), slice(1)):
        fed = {name: value[rows].numpy() for name, value in zip((*streams, "present"), inputs, strict=True)}
        np.testing.assert_allclose(session.run(None, fed)[0], expected[rows], atol=1e-5)
    told = session.get_modelmeta().custom_metadata_map
    assert told["epsilon"] == "none: not private"
    assert list(json.loads(told["streams"])) == list(streams)
    assert json.loads(told["sites"]) == ["one", "two"]


@pytest.mark.parametrize("to", [*FORMATS[:2], SLOW_BUNDLE, SLOW_ONNX])
def test_an_export_that_differs_or_is_stopped_leaves_nothing(tmp_path, make_run, write_run, monkeypatch, to):
    run_folder, place = write_run(make_run()), tmp_path / "place"
    place.mkdir()
    monkeypatch.setattr(comparison, "TOLERANCE", -1.0)
    with pytest.raises(PanfmError, match="differs from the run's model"):
        export_run(run_folder, to, place / "out", streams=() if to in FORMATS[:2] else ("eye-fundus",))
    assert list(place.iterdir()) == []


@pytest.mark.parametrize("to", FORMATS[:4])
def test_nothing_is_overwritten(tmp_path, make_run, write_run, to):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    result = panfm("export", write_run(make_run()), "--to", to, "--out", tmp_path / "out")
    assert result.exit_code == 1
    assert f"{tmp_path}/out: exists already" in result.stderr
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--to", "tflite"], "--to: found 'tflite', expected one of safetensors, dense-vit, monai-bundle, onnx"),
        (["--to", "onnx", "--streams", "brain-mr,liver-mr"], "--streams: found 'liver-mr', expected some of brain-mr"),
        (["--to", "safetensors", "--streams", "brain-mr"], "--streams: goes with monai-bundle and onnx"),
    ],
)
def test_bad_flags_are_one_line(tmp_path, make_run, write_run, flags, complaint):
    result = panfm("export", write_run(make_run()), "--out", tmp_path / "out", *flags)
    assert result.exit_code == 1
    assert result.stderr.startswith(complaint)
    assert len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("to", [*FORMATS[:3], SLOW_ONNX])
def test_a_place_that_cannot_be_written_is_one_line(tmp_path, make_run, write_run, to):
    (tmp_path / "file").touch()
    flags = ["--streams", "eye-fundus"] if to not in FORMATS[:2] else []
    result = panfm("export", write_run(make_run()), "--to", to, "--out", tmp_path / "file" / "out", *flags)
    assert result.exit_code == 1
    assert result.stderr.startswith(f"{tmp_path}/file/out: cannot be ")
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize("name", ["model.safetensors", "run.toml", "metadata.json"])
@pytest.mark.parametrize("content", [None, b"", b"{}", b"[1]", b"\x80garbage"])
def test_a_broken_run_folder_is_named(tmp_path, make_run, write_run, name, content):
    run_folder = write_run(make_run())
    path = run_folder / "model" / name
    path.unlink() if content is None else path.write_bytes(content)
    result = panfm("export", run_folder, "--to", "safetensors", "--out", tmp_path / "out")
    assert result.exit_code == 1
    assert all(name in line for line in result.stderr.splitlines())
    assert not (tmp_path / "out").exists()


def test_a_run_without_a_model_is_one_line(tmp_path, make_run, write_run):
    run_folder = write_run(make_run())
    shutil.rmtree(run_folder / "model")
    result = panfm("export", run_folder, "--to", "onnx", "--out", tmp_path / "out")
    assert result.stderr == f"{run_folder}: found no model/, expected the folder of a finished run\n"


def test_missing_packages_are_one_line(tmp_path, make_run, write_run, monkeypatch):
    monkeypatch.setattr("panfm.export.onnx.find_spec", lambda name: None if name == "onnxscript" else object())
    result = panfm("export", write_run(make_run()), "--to", "onnx", "--out", tmp_path / "out")
    assert result.exit_code == 1
    assert result.stderr == "--to onnx: onnxscript is not installed, expected: pip install 'panfm[onnx]'\n"


@pytest.mark.slow
@pytest.mark.parametrize("to", ["safetensors", "dense-vit", "monai-bundle", LONG_ONNX])
def test_streams_with_a_suffix_are_exported_by_their_names(tmp_path, write_run, to):
    table = "{ spacing-mm = [2.0, 2.0, 2.0], shape = [8, 8, 4], patch = [4, 4, 4] }"
    run = parse_run(
        f'name = "small"\n[streams]\n"brain-mr.t1" = {table}\n"brain-mr.flair" = {table}\nheart-ct = {table}\n'
    )
    run_folder, out = write_run(run), tmp_path / "out"
    chosen = {"streams": ("brain-mr.flair", "brain-mr.t1")} if to in ("monai-bundle", "onnx") else {}
    assert export_run(run_folder, to, out, **chosen) <= 1e-5
    if to == "onnx":
        names = [entry.name for entry in onnxruntime.InferenceSession(out).get_inputs()]
        assert names == ["brain-mr.flair", "brain-mr.t1", "present"]
    if to == "monai-bundle":
        metadata = json.loads((out / "configs" / "metadata.json").read_text())
        assert metadata["panfm"]["streams"]["brain-mr.t1"]["organ"] == "brain"
        (flair, t1, present), expected = own_embedding(run_folder, ("brain-mr.flair", "brain-mr.t1"))
        config = json.loads((out / "configs" / "inference.json").read_text())
        network = Embedder(str(out / "models" / "model.pt2"), config["network_def"]["shapes"]).eval()
        with torch.inference_mode():
            torch.testing.assert_close(network(flair, present, **{"brain-mr.t1": t1}), expected, atol=1e-5, rtol=0)
