"""`panfm.load`: embeddings, tokens, the encoder as a module."""

import nibabel
import numpy as np
import pytest
import torch
from PIL import Image

import panfm
from panfm.data.cache import open_store
from panfm.errors import ConfigError, DataError
from panfm.evaluate.embed import embed_site, load_model

DEX = '[model]\nbackbone = "director-experts"\n'


@pytest.fixture
def run_folder(make_run, write_run):
    return write_run(make_run())


@pytest.fixture
def files(tmp_path):
    """Two brains and an eye."""
    random = np.random.default_rng(0)
    for name in ("a", "b"):
        voxels = random.uniform(0, 1000, size=(8, 9, 10)).astype(np.float32)
        nibabel.save(nibabel.Nifti1Image(voxels, np.diag([2.0, 2.0, 2.0, 1.0])), tmp_path / f"{name}.nii.gz")
    Image.fromarray(random.integers(0, 255, (10, 12, 3), dtype=np.uint8)).save(tmp_path / "eye.png")
    return {"brain-mr": [tmp_path / "a.nii.gz", tmp_path / "b.nii.gz"], "eye-fundus": [None, tmp_path / "eye.png"]}


@pytest.mark.parametrize("place", ["", "model"])
def test_a_run_and_its_model_folder_are_loaded_alike(run_folder, place):
    model = panfm.load(str(run_folder / place))
    assert list(model.streams) == ["brain-mr", "heart-ct", "eye-fundus"]
    assert (model.embedding_size, model.metadata["sites"]) == (48, ["one", "two"])
    assert isinstance(model, panfm.Model)


@pytest.mark.parametrize("extra", ["", DEX, '[features]\npooling = "per-stream"\n'])
def test_files_are_embedded_as_a_site_is(tmp_path, make_run, write_run, write_site, extra):
    run_folder = write_run(make_run(extra))
    site = write_site(tmp_path / "site", "clinic", ("brain",))
    model = panfm.load(run_folder)
    store = open_store(site, model.streams)
    expected = embed_site(run_folder / "model", load_model(run_folder / "model")[0], store).features
    np.testing.assert_array_equal(model.embed(site), expected)
    np.testing.assert_array_equal(model.embed(store), expected)
    paths = [site / f"clinic-{number}-brain.nii.gz" for number in range(6)]
    np.testing.assert_array_equal(model.embed({"brain-mr": paths}), expected)
    np.testing.assert_allclose(model.embed({"brain-mr": str(paths[3])}), expected[3:4], atol=1e-6)


def test_a_subject_is_embedded_from_the_streams_that_it_has(run_folder, files):
    model = panfm.load(run_folder)
    both, brain, eye = (
        model.embed(images)
        for images in (files, {"brain-mr": files["brain-mr"]}, {"eye-fundus": files["eye-fundus"][1]})
    )
    np.testing.assert_allclose(both[0], brain[0], atol=1e-6)
    assert np.abs(both[1] - brain[1]).max() > 1e-3
    assert np.abs(both[1] - eye[0]).max() > 1e-3


def test_a_subject_without_any_image_is_refused(run_folder, files):
    """Its embedding would be a constant of the network."""
    files["brain-mr"][0] = None
    with pytest.raises(ConfigError, match="found None in every stream at place 0 of the lists, expected an image"):
        panfm.load(run_folder).embed(files)


def test_more_subjects_than_are_read_at_once(run_folder, files, monkeypatch):
    model = panfm.load(run_folder)
    expected = model.embed(files)
    monkeypatch.setattr("panfm.notebook.notebook_images._AT_ONCE", 1)
    np.testing.assert_allclose(model.embed(files), expected, atol=1e-6)
    assert model.tokens(files)["brain-mr"].values.shape == (2, 2, 2, 1, 48)


def test_another_pooling_is_read_off_the_same_model(run_folder, files):
    model = panfm.load(run_folder)
    layers = model.embed(files, pooling="layers:1,2")
    assert layers.shape == (2, 3 * 2 * 48)
    assert model.embed(files).shape == (2, 48)
    for wrong, complaint in (("max", "--pooling: found 'max'"), ("layers:3", "features.layers: found block 3")):
        with pytest.raises(ConfigError, match=complaint):
            model.embed(files, pooling=wrong)


def test_another_pooling_is_read_off_an_encoder_that_was_fine_tuned(run_folder, files):
    model = panfm.load(run_folder)
    norm = model.encoder.model.backbone.norm
    with torch.no_grad():
        norm.weight.zero_()
    cls_and_mean = model.embed(files, pooling="cls+mean")
    np.testing.assert_allclose(cls_and_mean, np.tile(norm.bias.detach().numpy(), (2, 2)), atol=1e-6)
    assert model.embed(files).shape == (2, 48)


def test_a_data_frame_names_the_subjects(run_folder, files, tmp_path, write_site):
    model = panfm.load(run_folder)
    frame = model.embed(files, frame=True)
    np.testing.assert_array_equal(frame.to_numpy(), model.embed(files))
    assert list(frame.index) == [str(path) for path in files["brain-mr"]]
    site = write_site(tmp_path / "site", "clinic", ("brain",))
    assert list(model.embed(site, frame=True).index) == [f"clinic-{number}" for number in range(6)]


def test_without_pandas_a_data_frame_is_one_line(run_folder, files, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pandas", None)
    with pytest.raises(ConfigError, match=r"^pandas: not installed, expected: pip install 'panfm\[evaluate\]'$"):
        panfm.load(run_folder).embed(files, frame=True)


@pytest.mark.parametrize("backbone", ["", DEX])
def test_the_encoder_is_a_module_as_others_are(make_run, write_run, files, backbone):
    model = panfm.load(write_run(make_run(backbone)))
    brains = torch.stack([torch.from_numpy(model.preprocess(path, "brain-mr")) for path in files["brain-mr"]])
    eye = torch.from_numpy(model.preprocess(files["eye-fundus"][1], "eye-fundus"))
    assert brains.shape == (2, 1, 8, 8, 4)
    eyes = torch.stack([torch.full_like(eye, torch.nan), eye])
    embedded = model.encoder(
        {"brain-mr": brains, "eye-fundus": eyes}, present={"eye-fundus": torch.tensor([False, True])}
    )
    np.testing.assert_allclose(embedded.detach(), model.embed(files), atol=1e-6)
    embedded.square().sum().backward()
    trained = {name.split(".")[1] for name, value in model.encoder.named_parameters() if value.grad is not None}
    assert trained == {"streams", "backbone"}
    assert not [name for name, _ in model.encoder.named_parameters() if name.startswith("model.heads")]
    model.encoder.load_state_dict(model.encoder.state_dict(), strict=True)


@pytest.mark.parametrize(
    ("images", "complaint"),
    [
        ({"liver-mr": torch.zeros(1, 1, 8, 8, 4)}, "stream: found 'liver-mr', expected some of brain-mr, heart-ct"),
        ({"brain-mr": torch.zeros(8, 8, 4)}, r"brain-mr: found images \[8, 8, 4\], expected \[B, 1, 8, 8, 4\]"),
        ({}, "images: found none"),
        (
            {"brain-mr": torch.zeros(1, 1, 8, 8, 4), "heart-ct": torch.zeros(2, 1, 8, 4, 4)},
            r"found batches of \[1, 2\] subjects",
        ),
    ],
)
def test_a_batch_that_does_not_fit_is_one_line(run_folder, images, complaint):
    with pytest.raises(ConfigError, match=complaint):
        panfm.load(run_folder).encoder(images)


@pytest.mark.parametrize(
    ("images", "complaint"),
    [
        ({"liver-mr": "a.nii.gz"}, "stream: found 'liver-mr'"),
        ({"brain-mr": ["a.nii.gz"], "heart-ct": []}, r"lists of unlike length \(brain-mr: 1, heart-ct: 0\)"),
        ({"brain-mr": []}, "lists of unlike length"),
        ({}, "images: found none"),
        ({"brain-mr": "absent.nii.gz"}, "absent.nii.gz: found no such file"),
        ("no-site", "no-site/site.toml: no such file"),
    ],
)
def test_files_that_do_not_fit_are_one_line(run_folder, images, complaint):
    model = panfm.load(run_folder)
    for use in (model.embed, model.tokens):
        with pytest.raises((ConfigError, DataError), match=complaint):
            use(images)


def test_tokens_of_a_site_and_of_its_files_are_the_same(tmp_path, run_folder, write_site):
    model = panfm.load(run_folder)
    site = write_site(tmp_path / "site", "clinic", ("brain",), subjects=2)
    grid = model.tokens(site)["brain-mr"]
    paths = [site / f"clinic-{number}-brain.nii.gz" for number in range(2)]
    np.testing.assert_array_equal(grid.values, model.tokens({"brain-mr": paths})["brain-mr"].values)
    assert grid.affines.shape == (2, 4, 4)


def test_tokens_are_those_of_the_model_alone(run_folder, files):
    model = panfm.load(run_folder)
    grids = model.tokens(files)
    assert {name: grid.values.shape for name, grid in grids.items()} == {
        "brain-mr": (2, 2, 2, 1, 48),
        "eye-fundus": (1, 2, 2, 48),
    }
    assert grids["eye-fundus"].subjects.tolist() == [1]
    assert grids["eye-fundus"].affines is None
    network = model.encoder.model
    image = torch.from_numpy(model.preprocess(files["brain-mr"][0], "brain-mr"))[None]
    batch = panfm.notebook.loaded_model.Batch(1, {"brain-mr": image}, {"brain-mr": torch.tensor([0])})
    with torch.inference_mode():
        [tokens] = network.encode(network.patch_features(batch)).tokens
    np.testing.assert_allclose(grids["brain-mr"].values[0].reshape(4, 48), tokens, atol=1e-6)


def test_a_folder_without_a_model_is_one_line(tmp_path):
    with pytest.raises(DataError, match=r"absent: no such folder, expected the folder of a finished run"):
        panfm.load(tmp_path / "absent")
