"""`panfm embed`, `panfm probe` and `panfm report` as a person types them."""

import json
import shutil

import nibabel as nib
import numpy as np
import pytest
from safetensors.torch import save_file
from typer.testing import CliRunner

from panfm.cli import main
from panfm.config import RunConfig, StreamConfig, dump_toml
from panfm.evaluate.embed import read_features
from panfm.models import build_model

STREAM = StreamConfig(shape=(8, 8, 8), patch=(4, 4, 4), spacing_mm=(2.0, 2.0, 2.0))
RUN = RunConfig(name="toy", streams={"brain-mr": STREAM})


def panfm(*arguments):
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A run folder and a site of 36 subjects with a bright or a dark half."""
    folder = tmp_path_factory.mktemp("place")
    (folder / "model").mkdir()
    save_file(build_model(RUN).state_dict(), folder / "model" / "model.safetensors")
    for where in (folder, folder / "model"):
        (where / "run.toml").write_text(dump_toml(RUN))
    (folder / "model" / "metadata.json").write_text(json.dumps({"rounds": 0}))
    generator, rows, labels = np.random.default_rng(0), ["subject,stream,path,split"], ["subject,bright,share"]
    for number in range(36):
        share = generator.random()
        voxels = (generator.random((8, 8, 8)) < share).astype(np.int16)
        nib.save(nib.Nifti1Image(voxels, np.diag([2.0, 2.0, 2.0, 1.0])), folder / f"{number}.nii.gz")
        rows.append(f"p{number},brain-mr,{number}.nii.gz,{'test' if number % 3 == 0 else 'train'}")
        labels.append(f"p{number},{int(share > 0.5)},{share * 100:.3f}")
    (folder / "site.toml").write_text('name = "site"\nlabels = "labels.csv"\n')
    (folder / "manifest.csv").write_text("\n".join(rows) + "\n")
    (folder / "labels.csv").write_text("\n".join(labels) + "\n")
    return folder


def test_pooling_flag_and_whitening_change_what_is_embedded(place, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(place / "model", model)

    def embedded(*flags):
        assert panfm("embed", model, place, "--out", tmp_path / "out.npz", *flags).exit_code == 0
        return read_features(tmp_path / "out.npz")

    plain, layers = embedded(), embedded("--pooling", "layers:2")
    assert (plain.pooling, plain.features.shape) == ("cls", (36, 48))
    assert (layers.pooling, layers.features.shape) == ("layers:2", (36, 144))
    refused = panfm("embed", model, place, "--out", tmp_path / "out.npz", "--pooling", "layers:3")
    assert (refused.exit_code, refused.stderr) == (1, "features.layers: found block 3, expected 1 to 2\n")
    refused = panfm("embed", model, place, "--out", tmp_path / "out.npz", "--pooling", "max")
    assert refused.stderr.startswith("--pooling: found 'max', expected one of cls, mean, cls+mean")
    written = panfm("whiten", model, place)
    assert written.exit_code == 0
    digest = json.loads((model / "metadata.json").read_text())["whitening"]
    assert written.output.replace("\n", "").endswith(f"whitening of 48 numbers, SHA-256 {digest}")
    whitened = embedded()
    assert whitened.pooling == "cls, whitened"
    assert not np.allclose(whitened.features, plain.features)
    assert np.array_equal(embedded("--pooling", "cls").features, plain.features)
    (model / "whitening.safetensors").write_bytes(b"other")
    refused = panfm("embed", model, place, "--out", tmp_path / "out.npz")
    assert refused.stderr.startswith(f"{model}/whitening.safetensors: is not the whitening that metadata.json tells of")


@pytest.mark.parametrize("name", ["", "site.toml/out.npz"])
def test_where_features_cannot_be_written_is_told_before_any_image_is_read(place, tmp_path, monkeypatch, name):
    monkeypatch.setattr("panfm.cli.model_commands._opened", lambda *_: pytest.fail("images were read"))
    refused = panfm("embed", place, place, "--out", place / name)
    assert refused.stderr.startswith(f"{place / name}: cannot be written (")
    assert (refused.exit_code, len(refused.stderr.splitlines())) == (1, 1)


def test_what_a_command_leaves_out_of_a_site_is_told(place, tmp_path):
    site = tmp_path / "site"
    site.mkdir()
    (site / "site.toml").write_text('name = "site"\n')
    rows = [f"p{number},{stream},{place}/{number}.nii.gz" for number, stream in enumerate(("brain-mr", "liver-ct"))]
    (site / "manifest.csv").write_text(
        "\n".join(["subject,stream,path", *rows, f"p3,brain-mr,{place}/3.nii.gz"]) + "\n"
    )
    (site / "quarantine.csv").write_text(f"subject,stream,path,copy,voxels,reason\np3,brain-mr,{place}/3.nii.gz,1,,x\n")
    lines = panfm("embed", place, site, "--out", tmp_path / "out.npz").output.splitlines()
    assert f"{site}: 1 image of liver-ct left out, the model has no such stream" in lines
    assert f"{site}: 1 image left out by quarantine.csv" in lines


def test_a_model_with_a_claim_gets_no_whitening(place, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(place / "model", model)
    private = {"epsilon": 8.0, "delta": 1e-3, "public-subjects": 100, "noise-multiplier": 1.5, "sample-rate": 0.1}
    run = RunConfig.model_validate(RUN.model_dump(by_alias=True, exclude_none=True) | {"patient-dp": private})
    (model / "run.toml").write_text(dump_toml(run))
    refused = panfm("whiten", model, place)
    assert refused.exit_code == 1
    assert refused.stderr.startswith(f"{model}: a whitening is fitted without noise, expected a model without a claim")
    assert not (model / "whitening.safetensors").exists()


def test_embed_then_probe_then_report(place):
    out = place / "features.npz"
    embedded = panfm("embed", place / "model", place, "--out", out)
    assert embedded.exit_code == 0
    assert "36 subjects, 48 features" in embedded.output.replace("\n", " ")
    probed = panfm("probe", out, "--labels", place / "labels.csv")
    assert probed.exit_code == 0
    assert "auc" in next(line for line in probed.output.splitlines() if "bright" in line)
    assert "r2" in next(line for line in probed.output.splitlines() if "share" in line)
    reported = panfm("report", place)
    assert reported.exit_code == 0
    assert (place / "report.html").exists()


def test_a_run_folder_stands_for_its_model(place, tmp_path):
    by_run, by_model = tmp_path / "run.npz", tmp_path / "model.npz"
    assert panfm("embed", place, place, "--out", by_run).exit_code == 0
    assert panfm("embed", place / "model", place, "--out", by_model).exit_code == 0
    assert by_run.read_bytes() == by_model.read_bytes()
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    (unfinished / "rounds.jsonl").touch()
    refused = panfm("embed", unfinished, place, "--out", by_run)
    assert refused.stderr == f"{unfinished}: found no model/, expected the folder of a finished run\n"


def test_files_are_embedded_as_a_site_is(place, tmp_path):
    out = tmp_path / "files.npz"
    assert panfm("embed", place, place / "3.nii.gz", place / "5.nii.gz", "--out", out).exit_code == 0
    files = read_features(out)
    panfm("embed", place, place, "--out", tmp_path / "site.npz")
    site = read_features(tmp_path / "site.npz")
    assert (files.subjects, files.splits) == (("3", "5"), ("test", "test"))
    np.testing.assert_allclose(files.features, site.features[[3, 5]], atol=1e-5)
    for words, why in {
        (place / "3.nii.gz", "--stream", "brain-ct"): "--stream: found 'brain-ct', expected one of brain-mr",
        (place / "3.nii.gz", place): f"{place}: a site beside others, expected one site, or image files",
        (tmp_path / "none.nii.gz",): f"{tmp_path}/none.nii.gz: found no such file, expected an image",
    }.items():
        refused = panfm("embed", place, *words, "--out", out)
        assert (refused.exit_code, refused.stderr) == (1, f"{why}\n")


def test_a_run_and_a_site_are_probed_in_one_step(place, tmp_path):
    """`panfm probe RUN SITE` gives the scores of `panfm embed` and `panfm probe FILE --labels`; labels may be words."""
    out = tmp_path / "features.npz"
    panfm("embed", place, place, "--out", out)
    two_steps = panfm("probe", out, "--labels", place / "labels.csv")
    one_step = panfm("probe", place, place)
    assert one_step.exit_code == 0
    assert one_step.output == two_steps.output
    words = (place / "labels.csv").read_text().replace(",1,", ",M,").replace(",0,", ",F,")
    (tmp_path / "labels.csv").write_text(words)
    told = panfm("probe", out, "--labels", tmp_path / "labels.csv").output
    assert "bright: f is read as 0, m as 1" in told
    assert told.partition("\n")[2] == two_steps.output
    (tmp_path / "labels.csv").write_text(words.replace("bright", "[/b]"))
    assert "[/b]" in panfm("probe", out, "--labels", tmp_path / "labels.csv").output
    (tmp_path / "labels.csv").write_text("subject,bright\np1,1\n")
    refused = panfm("probe", out, "--labels", tmp_path / "labels.csv")
    assert refused.stderr == f"{tmp_path}/labels.csv: no label to probe, expected a column whose values vary\n"
    assert panfm("probe", out).stderr.startswith("--labels: missing, expected a label table")


@pytest.mark.parametrize(
    "arguments",
    [
        ("embed", "model", "nowhere", "--out", "x.npz"),
        ("embed", "nowhere", ".", "--out", "x.npz"),
        ("probe", "nowhere.npz", "--labels", "labels.csv"),
        ("probe", "manifest.csv", "--labels", "labels.csv"),
        ("probe", "labels.csv", "--labels", "nowhere.csv"),
        ("report", "nowhere"),
    ],
)
def test_what_is_not_there_is_one_line(place, arguments):
    paths = [str(place / word) if "." in word or word in ("model", "nowhere") else word for word in arguments]
    result = panfm(*paths)
    assert result.exit_code == 1
    assert len(result.output.strip().splitlines()) == 1
    assert "Traceback" not in result.output


def test_an_unwritable_place_is_one_line(place):
    (place / "file").write_text("")
    result = panfm("embed", place / "model", place, "--out", place / "file" / "x.npz")
    assert result.exit_code == 1
    assert "cannot be written" in result.output
