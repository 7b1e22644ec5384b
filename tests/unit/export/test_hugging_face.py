"""Hugging Face folders: the whole model for `panfm.load`, and one stream for transformers."""

import json

import numpy as np
import pytest
import torch

import panfm
from panfm.config import dump_toml, parse_run
from panfm.errors import DataError
from panfm.evaluate.result import ProbeResult, Score, write_result
from panfm.export.formats import export_run
from panfm.export.network import random_inputs
from panfm.models.public_weights import read_public
from tests.unit.export.test_export import DEX, whitening_of
from tests.unit.export.test_timm_folder import CASES, MODELS, export
from tests.unit.report.test_status import line

__all__ = ["export"]


@pytest.mark.parametrize(("model", "whitened"), [("", False), (DEX, False), ('[features]\npooling = "layers"\n', True)])
def test_the_whole_model_loads_back(tmp_path, make_run, write_run, model, whitened):
    run = make_run(model)
    folder = write_run(run, whitening_of(run) if whitened else None)
    assert export_run(folder, "huggingface", tmp_path / "out") <= 1e-6
    inputs = random_inputs(run.streams)
    embedded = []
    for place in (folder, tmp_path / "out"):
        *images, present = inputs
        encoder = panfm.load(place).encoder
        columns = dict(zip(run.streams, present.T, strict=True))
        with torch.inference_mode():
            embedded.append(encoder(dict(zip(run.streams, images, strict=True)), present=columns))
    torch.testing.assert_close(*embedded, atol=1e-6, rtol=0)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    expected = {"README.md", "config.json", "metadata.json", "model.safetensors", "run.toml"}
    assert names == expected | ({"whitening.safetensors"} if whitened else set())
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "panfm"


def test_the_encoder_of_one_stream_is_read_back(export):
    out, _, _ = export(MODELS["learned"], to="huggingface")
    public = read_public(out)
    assert (public.family, public.heads, public.normalisation[0]) == ("dinov2", 3, (0.0,) * 3)
    config = json.loads((out / "config.json").read_text())
    assert (config["model_type"], config["num_register_tokens"], config["image_size"]) == (
        "dinov2_with_registers",
        2,
        8,
    )
    with pytest.raises(DataError, match="out: holds one stream's encoder for timm or transformers, expected"):
        panfm.load(out)


@pytest.mark.slow  # transformers takes seconds to import
@pytest.mark.parametrize(("model", "stream"), CASES)
def test_transformers_loads_the_encoder_offline(export, monkeypatch, model, stream):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from transformers import AutoModel

    out, images, expected = export(MODELS[model], stream, to="huggingface")
    network, told = AutoModel.from_pretrained(out, output_loading_info=True)
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    with torch.inference_mode():
        tokens = network.eval()(pixel_values=images).last_hidden_state
    registers = 2 if model == "learned" else 0
    actual = torch.cat([tokens[:, :1], tokens[:, 1 + registers :]], dim=1)
    np.testing.assert_allclose(actual, expected, atol=1e-6 * max(1.0, float(expected.abs().max())))


def test_the_card_tells_of_sites_privacy_saliency_probes_and_failures(tmp_path, make_run, write_run):
    folder = write_run(make_run())
    (folder / "run.toml").write_text(dump_toml(make_run()))
    (folder / "rounds.jsonl").write_text(json.dumps(line(2)) + "\n")
    write_result(folder / "probe.json", ProbeResult((Score("federated", "all", "auc", 0.7, 0.6, 0.8, 3),), {}, {}, {}))
    export_run(folder, "huggingface", tmp_path / "out", licence="CC-BY-4.0")
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: panfm\n")
    for text in (
        "license_name: CC-BY-4.0",
        "| sites | one, two |",
        "| privacy | none: not private |",
        "| run | `small-1`, 2 rounds |",
        "| federated | all | auc | 0.700 [0.600, 0.800] |",
        "research; not a medical device. Features",
        f"| `brain-mr` | 8 x 8 x 4 | 2 x 2 x 2 | the scan's own 1st to 99th percentile to 0 to 1, clipped | not told | "
        f"{line(2)['profile']['brain-mr']:.2f} |",
        *(f"* {site}: left out of 1 of 1 rounds" for site in line(2)["rejected"]),
    ):
        assert text in card


def test_the_card_of_a_model_alone_says_what_is_not_known(tmp_path, write_run, make_run):
    export_run(write_run(make_run()) / "model", "huggingface", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "The run was not probed: nothing is known" in card
    assert "| not told | not told |" in card
    assert parse_run((tmp_path / "out" / "run.toml").read_text()).name == "small"
