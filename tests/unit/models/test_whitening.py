"""The file of a whitening: read back, tied to the metadata, refused when it is another."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from panfm.config import RunConfig, dump_toml
from panfm.errors import ConfigError, DataError
from panfm.evaluate.embed import load_model
from panfm.evaluate.fit_whitening import fit_whitening
from panfm.models import build_model
from panfm.models.whitening import FILE, Whitening, read_whitening, save_whitening

SIZES = {"streams": 2, "size": 3, "pooling": "cls"}


def whitening(scale=1.0):
    return Whitening(torch.zeros(2, 3), torch.ones(2, 3), scale * torch.eye(3).expand(2, 3, 3))


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "metadata.json").write_text('{"name": "small"}')
    return tmp_path


def test_what_was_written_is_read_back_and_the_metadata_keep_what_they_had(folder):
    assert read_whitening(folder, **SIZES) is None
    digest = save_whitening(folder, whitening(), "cls")
    assert json.loads((folder / "metadata.json").read_text()) == {"name": "small", "whitening": digest}
    back = read_whitening(folder, **SIZES)
    assert all(torch.equal(getattr(back, name), getattr(whitening(), name)) for name in ("centre", "scale", "matrix"))
    first = (folder / FILE).read_bytes()
    assert save_whitening(folder, whitening(), "cls") == digest
    assert (folder / FILE).read_bytes() == first


@torch.no_grad()
def test_streams_are_averaged_by_hand():
    two = Whitening(torch.tensor([[0.0], [1.0]]), torch.tensor([[1.0], [2.0]]), torch.tensor([[[3.0]], [[4.0]]]))
    present = torch.tensor([[True, False], [False, True], [True, True], [False, False]])
    assert two(torch.full((4, 1), 5.0), present).flatten().tolist() == [15.0, 8.0, 11.5, 0.0]
    assert two.only([1])(torch.full((1, 1), 5.0), torch.tensor([[True]])).item() == 8.0


DAMAGE = {
    "changed": lambda folder: (folder / FILE).write_bytes((folder / FILE).read_bytes() + b" "),
    "gone": lambda folder: (folder / FILE).unlink(),
    "unknown to the metadata": lambda folder: (folder / "metadata.json").write_text("{}"),
    "without metadata": lambda folder: (folder / "metadata.json").unlink(),
    "no JSON": lambda folder: (folder / "metadata.json").write_text("{"),
    "other": lambda folder: save_file({"centre": torch.zeros(1)}, folder / FILE),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_file_that_is_not_the_one_told_of_is_refused(folder, damage):
    save_whitening(folder, whitening(), "cls")
    DAMAGE[damage](folder)
    with pytest.raises(DataError) as caught:
        read_whitening(folder, **SIZES)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_another_pooling_or_model_is_refused(folder):
    save_whitening(folder, whitening(), "cls")
    with pytest.raises(ConfigError, match="was fitted under pooling cls, expected layers; fit it again"):
        read_whitening(folder, **SIZES | {"pooling": "layers"})
    with pytest.raises(DataError, match="centre does not hold"):
        read_whitening(folder, **SIZES | {"size": 4})
    save_whitening(folder, whitening(float("nan")), "cls")
    with pytest.raises(DataError, match="matrix does not hold"):
        read_whitening(folder, **SIZES)


def test_a_model_is_read_with_its_whitening(folder, make_run, make_store):
    run: RunConfig = make_run()
    model, store = build_model(run).eval(), make_store(run, 12)
    save_file(dict(model.split_state(run.sharing)[0]), folder / "model.safetensors")
    (folder / "run.toml").write_text(dump_toml(run))
    with torch.no_grad():
        plain = model.embed(store.batch(np.arange(12)))
        fitted = fit_whitening(model, {"one": store}, run.features.model_copy(update={"whitening_crops": 20}), 0)
        save_whitening(folder, fitted, "cls")
        whitened = load_model(folder)[0].eval().embed(store.batch(np.arange(12)))
        again = load_model(folder, whitened=False)[0].eval().embed(store.batch(np.arange(12)))
        other = load_model(folder, run.features)[0].eval().embed(store.batch(np.arange(12)))
    (folder / "metadata.json").write_text("{}")
    (folder / FILE).unlink()
    wanting = run.model_copy(update={"features": run.features.model_copy(update={"whitening": True})})
    (folder / "run.toml").write_text(dump_toml(wanting))
    with pytest.raises(DataError, match=r"holds no whitening, which run\.toml asks for, expected: panfm whiten"):
        load_model(folder)
    assert torch.equal(again, plain)
    assert torch.equal(other, plain)
    assert not torch.allclose(whitened, plain)
