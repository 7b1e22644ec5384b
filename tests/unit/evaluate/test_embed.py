import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from panfm.config import RunConfig, StreamConfig
from panfm.config.load import dump_toml
from panfm.data.store import ImageStore
from panfm.errors import DataError, PanfmError
from panfm.evaluate.embed import (
    embed_site,
    embed_store,
    load_model,
    mean_of_sessions,
    read_features,
    write_features,
)
from panfm.models import build_model

STREAM = StreamConfig(shape=(4, 4, 4), patch=(2, 2, 2), spacing_mm=(1.0, 1.0, 1.0))
RUN = RunConfig(name="toy", streams={"brain-mr": STREAM, "liver-mr": STREAM})


def make_store(n=7):
    generator = np.random.default_rng(0)
    images = {name: generator.random((n - 2, 1, 4, 4, 4), dtype=np.float32) for name in RUN.streams}
    rows = {"brain-mr": np.arange(n - 2), "liver-mr": np.arange(2, n)}
    return ImageStore(tuple(f"p{i}" for i in range(n)), ("train",) * n, images, rows)


@pytest.fixture
def folder(tmp_path):
    save_file(build_model(RUN).state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "run.toml").write_text(dump_toml(RUN))
    return tmp_path


def test_features_do_not_depend_on_the_batch_size():
    model, store, done = build_model(RUN), make_store(), []
    whole = embed_store(model, store, np.arange(7))
    small = embed_store(model, store, np.arange(7), batch_size=2, on_batch=done.append)
    np.testing.assert_allclose(whole, small, atol=1e-5)  # padding differs by rounding alone
    assert whole.dtype == np.float32
    assert sum(done) == 7


def test_features_follow_the_order_asked_for_and_the_streams_named():
    model, store = build_model(RUN), make_store()
    whole = embed_store(model, store, np.arange(7))
    np.testing.assert_allclose(embed_store(model, store, [5, 2]), whole[[5, 2]], atol=1e-5)
    brain = embed_store(model, store, [0, 5, 6], ["brain-mr"])
    np.testing.assert_allclose(brain[0], whole[0], atol=1e-5)
    np.testing.assert_array_equal(brain[1], brain[2])  # neither holds a brain: the CLS token alone


def test_nobody_gives_an_empty_table():
    assert embed_store(build_model(RUN), make_store(), []).shape == (0, 48)


def test_model_comes_back_from_disk_and_features_round_trip(folder):
    model, run = load_model(folder)
    assert run == RUN
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in build_model(RUN).state_dict().items())
    table = embed_site(folder, model, make_store())
    path = folder / "features.npz"
    write_features(path, table)
    back = read_features(path)
    np.testing.assert_array_equal(back.features, table.features)
    np.testing.assert_array_equal(back.present[:, 0], [1, 1, 1, 1, 1, 0, 0])
    assert (back.subjects, back.splits, back.streams) == (table.subjects, table.splits, table.streams)
    assert back.model_hash == table.model_hash
    first = path.read_bytes()
    write_features(path, table)
    assert path.read_bytes() == first


@pytest.mark.parametrize("name", ["model.safetensors", "run.toml"])
@pytest.mark.parametrize("content", [None, b"", b"{}", b"\x80garbage"])
def test_every_line_about_a_broken_model_folder_names_the_file(folder, name, content):
    (folder / name).unlink() if content is None else (folder / name).write_bytes(content)
    with pytest.raises(PanfmError, match=name) as caught:
        load_model(folder)
    assert all(name in line for line in str(caught.value).splitlines())


def test_weights_of_another_model_are_refused(folder):
    save_file({"backbone.cls": torch.zeros(3)}, folder / "model.safetensors")
    with pytest.raises(DataError, match="does not fit") as caught:
        load_model(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [None, b"", b"PK\x03\x04 truncated", b"text"])
def test_a_broken_feature_file_is_one_line(tmp_path, content):
    path = tmp_path / "features.npz"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=r"features.npz: ") as caught:
        read_features(path)
    assert "\n" not in str(caught.value)


def test_a_foreign_array_file_is_refused(tmp_path):
    path = tmp_path / "features.npz"
    np.savez(path, x=np.zeros(3))
    with pytest.raises(DataError, match="not a feature file"):
        read_features(path)


def test_every_session_is_embedded_and_a_patient_is_their_mean(folder):
    model, store = build_model(RUN), make_store(3)
    random = np.random.default_rng(1)
    images = {name: random.random((3, 1, 4, 4, 4), dtype=np.float32) for name in RUN.streams}
    rows = {"brain-mr": np.array([0, 1, 1]), "liver-mr": np.array([1, 1, 2])}
    sessions = {"brain-mr": ["", "1", "2"], "liver-mr": ["2", "3", ""]}
    store = ImageStore(store.subjects, ("train", "val", "test"), images, rows, sessions)
    table = embed_site(folder, model, store)
    assert table.subjects == ("p0", "p1", "p1", "p1", "p2")
    assert table.splits == ("train", "val", "val", "val", "test")
    assert table.sessions == ("", "1", "2", "3", "")
    assert table.present.tolist() == [[1, 0], [1, 0], [1, 1], [0, 1], [0, 1]]
    first = embed_store(model, store, [1], ["brain-mr"])
    np.testing.assert_allclose(table.features[1:2], first, atol=1e-6)
    write_features(folder / "features.npz", table)
    back = read_features(folder / "features.npz")
    assert back.sessions == table.sessions
    mean = mean_of_sessions(back)
    assert (mean.subjects, mean.splits, mean.sessions) == (("p0", "p1", "p2"), ("train", "val", "test"), ())
    assert mean.present.tolist() == [[1, 0], [1, 1], [0, 1]]
    np.testing.assert_allclose(mean.features[1], table.features[1:4].mean(axis=0))
