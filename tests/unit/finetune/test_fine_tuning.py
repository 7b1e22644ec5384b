"""The training loop: same bits after an interruption, trained parts, early stopping, and the folder it writes."""

import json

import nibabel
import numpy as np
import pytest
import safetensors.torch
import torch

import panfm
from panfm.errors import ConfigError, DataError
from panfm.export.final_model import Source
from panfm.export.formats import export_run
from panfm.export.model_card import model_card
from panfm.files import locked
from panfm.finetune import fine_tuning
from panfm.finetune.fine_tuning import batch_of_step
from panfm.finetune.finetune_job import FinetuneJob
from panfm.finetune.starting_model import starting_model
from panfm.notebook.notebook_images import files_of
from tests.cases import quick
from tests.conftest import SMALL_RUN


class Interrupted(Exception):
    pass


def content(folder):
    names = ("model/model.safetensors", "model/head.safetensors", "result.json", "finetune.toml")
    return {name: (folder / name).read_bytes() for name in names}


@pytest.fixture
def model(make_run, write_run):
    return write_run(make_run())


@pytest.mark.slow
@pytest.mark.parametrize("task", ["segmentation", "labels.csv:bright"])
def test_the_same_bits_after_an_interruption(task, model, labelled_site, settings_of, tmp_path):
    settings = settings_of(model, labelled_site(), task)
    FinetuneJob.open(settings, tmp_path / "whole").run()
    torch.manual_seed(1)  # nothing draws from the global generator

    def stop(done, total):
        if done == 5:
            raise Interrupted

    with pytest.raises(Interrupted):
        FinetuneJob.open(settings, tmp_path / "parts").run(stop)
    FinetuneJob.open(settings, tmp_path / "parts").run()
    assert content(tmp_path / "whole") == content(tmp_path / "parts")
    before = content(tmp_path / "whole")
    with pytest.raises(DataError, match="has ended"):
        FinetuneJob.open(settings, tmp_path / "whole").run()
    assert content(tmp_path / "whole") == before


def other_label(site, model):
    text = (site / "labels.csv").read_text()
    (site / "labels.csv").write_text(text.replace("clinic-0,no", "clinic-0,yes"))


def other_image(site, model):
    path = site / "clinic-0-1.nii.gz"
    scan = nibabel.load(path)
    nibabel.save(nibabel.Nifti1Image(np.asarray(scan.dataobj)[::-1], scan.affine), path)


def other_weights(site, model):
    path = model / "model" / "model.safetensors"
    state = safetensors.torch.load_file(path)
    safetensors.torch.save_file({name: value + 0.01 for name, value in state.items()}, path)


@pytest.mark.slow
@pytest.mark.parametrize("change", [other_label, other_image, other_weights])
def test_other_data_are_not_gone_on_with(model, labelled_site, settings_of, tmp_path, change):
    site = labelled_site()
    settings = settings_of(model, site)

    def stop(done, total):
        raise Interrupted

    with pytest.raises(Interrupted):
        FinetuneJob.open(settings, tmp_path / "out").run(stop)
    change(site, model)
    with pytest.raises(DataError, match="have changed since"):
        FinetuneJob.open(settings, tmp_path / "out").run()


@pytest.mark.parametrize(
    ("parts", "changed"),
    quick(
        [
            ("lora:1:2", lambda name: "blocks.1.attention" in name and name.endswith("weight")),
            ("head", lambda name: False),
            ("norms", lambda name: "backbone" in name and "norm" in name),
            ("last-blocks:1", lambda name: "blocks.1" in name or "backbone.norm" in name),
            ("vectors", lambda name: not name.endswith("weight") or "norm" in name),
            ("all", lambda name: "registers" not in name),
        ],
        1,
    ),
)
def test_only_the_parts_named_are_trained(parts, changed, model, labelled_site, settings_of, tmp_path):
    settings = settings_of(
        model, labelled_site(), "segmentation", parts=parts, steps=3, layer_decay=1.0, learning_rate=0.01
    )
    FinetuneJob.open(settings, tmp_path / "out").run()
    before, after = (panfm.load(place).encoder.model.state_dict() for place in (model, tmp_path / "out"))
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert all(changed(name) for name in moved)
    assert bool(moved) == (parts != "head")


@pytest.mark.slow
def test_early_stopping_keeps_the_best(model, labelled_site, settings_of, tmp_path, monkeypatch):
    settings = settings_of(model, labelled_site(), steps=20, validate_every=1, patience=2)
    losses = iter([5.0, 3.0, 1.0, 2.0, 2.0, 0.0])
    tuned = []

    class Scripted(fine_tuning.FineTuning):
        def _validate(self, folder):
            loss = next(losses)
            self.head.loss, usual = (lambda *_: torch.tensor(loss)), self.head.loss
            super()._validate(folder)
            self.head.loss = usual
            tuned.append({name: value.clone() for name, value in self.head.state_dict().items()})

    monkeypatch.setattr("panfm.finetune.finetune_job.FineTuning", Scripted)
    FinetuneJob.open(settings, tmp_path / "out").run()
    training = json.loads((tmp_path / "out" / "result.json").read_text())["training"]
    assert (training["best_step"], training["step"], training["best_loss"]) == (2, 4, 1.0)
    head = panfm.load(tmp_path / "out").task_model.head.state_dict()
    assert all(torch.equal(head[name], tuned[2][name]) for name in head)


def test_patience_counts_from_the_end_of_the_warm_up(model, labelled_site, settings_of, tmp_path):
    settings = settings_of(model, labelled_site(), steps=40, validate_every=1, patience=1)
    job = FinetuneJob.open(settings, tmp_path / "out")
    tuning = fine_tuning.FineTuning(starting_model(model / "model")[0], job.data, settings)
    tuning.head.loss = lambda outputs, targets: outputs.sum() * 0.0 + 1.0
    tuning.run()
    assert tuning.progress.step == 4
    assert tuning.notes() == (
        "training: no validation was better than the one before the first step, whose model is kept",
        "training: stopped after 4 of 40 steps, best after 0",
    )


def test_images_of_numbers_are_not_cropped(model, labelled_site, settings_of, tmp_path):
    site = labelled_site()
    for task, crop in (("labels.csv:size", (1.0, 1.0)), ("labels.csv:bright", (0.5, 1.0))):
        job = FinetuneJob.open(settings_of(model, site, task), tmp_path / "out")
        tuning = fine_tuning.FineTuning(starting_model(model / "model")[0], job.data, job.settings)
        assert tuning.augmentation._streams["brain-mr"][1].crop == crop


def test_one_process_at_a_time(model, labelled_site, settings_of, tmp_path):
    job = FinetuneJob.open(settings_of(model, labelled_site()), tmp_path / "out")
    (tmp_path / "out").mkdir()
    with locked(tmp_path / "out" / ".finetune.lock", wait_s=0.0), pytest.raises(DataError, match="another process"):
        job.run()
    assert not (tmp_path / "out" / "checkpoint.state").exists()


def test_batches_cover_everybody_once_a_pass():
    indices = np.array([3, 5, 7, 9, 11])
    passes = [np.concatenate([batch_of_step(indices, 2, step, 0) for step in (0, 1)]) for _ in range(2)]
    assert len(set(passes[0].tolist())) == 4
    assert passes[0].tolist() == passes[1].tolist()
    assert batch_of_step(indices, 8, 3, 0).size == 5


@pytest.mark.slow
def test_a_model_of_labels_in_python(model, labelled_site, settings_of, tmp_path):
    site = labelled_site()
    job = FinetuneJob.open(settings_of(model, site, "labels.csv:grade"), tmp_path / "out")
    job.run()
    tuned = panfm.load(tmp_path / "out")
    assert tuned.task.outputs == ("grade=high", "grade=low", "grade=mid")
    paths = [site / "clinic-1-only.nii.gz", site / "clinic-2-only.nii.gz"]
    shares = tuned.predict({"brain-mr": paths})
    assert shares.shape == (2, 3)
    assert shares.sum(axis=1) == pytest.approx(np.ones(2), abs=1e-5)
    assert tuned.predict({"brain-mr": paths[1]}) == pytest.approx(shares[1:], abs=1e-5)
    visits = tuned.predict({"brain-mr": [site / "clinic-0-1.nii.gz", site / "clinic-0-2.nii.gz"]})
    of_site = tuned.predict(site)
    assert len(of_site) == 12
    assert of_site[:3] == pytest.approx(np.concatenate([visits.mean(axis=0)[None], shares]), abs=1e-5)
    with pytest.raises(ConfigError, match="was not fine-tuned, expected the folder of: panfm finetune"):
        panfm.load(model).predict({"brain-mr": paths})
    for form in ("safetensors", "huggingface"):
        export_run(tmp_path / "out", form, tmp_path / form)
        assert panfm.load(tmp_path / form).predict({"brain-mr": paths}) == pytest.approx(shares, abs=1e-6)


def test_a_segmentation_writes_masks_on_the_scans_own_grid(model, labelled_site, settings_of, tmp_path):
    site = labelled_site()
    turned = nibabel.load(site / "clinic-3-only.nii.gz").get_fdata()[:, ::-1].astype(np.float32)
    angle = np.deg2rad(10)
    affine = np.diag([2.0, -2.0, 2.0, 1.0])
    affine[:2, :2] = [[2 * np.cos(angle), 2 * np.sin(angle)], [2 * np.sin(angle), -2 * np.cos(angle)]]
    affine[:3, 3] = [5.0, 20.0, -3.0]
    nibabel.save(nibabel.Nifti1Image(turned, affine), site / "clinic-3-only.nii.gz")
    mask = np.asarray(nibabel.load(site / "clinic-3-only-seg.nii.gz").dataobj)[:, ::-1]
    nibabel.save(nibabel.Nifti1Image(mask, affine), site / "clinic-3-only-seg.nii.gz")
    result = FinetuneJob.open(settings_of(model, site, "segmentation"), tmp_path / "out").run()
    written = nibabel.load(tmp_path / "out" / "masks" / "0001.nii.gz")
    assert (tmp_path / "out" / "masks" / "masks.csv").read_text().splitlines()[1].startswith("clinic-3,brain-mr,")
    assert written.shape == (9, 8, 6)
    assert np.allclose(written.affine, affine, atol=1e-5)
    assert set(np.unique(written.dataobj)) <= {0, 7}
    assert result.find("grid", "dice").value > 0.9
    source = Source.read(tmp_path / "out")
    assert source.metadata == json.loads((tmp_path / "out" / "model" / "metadata.json").read_text())
    card = model_card(source, source.metadata, "panfm")
    assert "fine-tuned for `segmentation`, with labels or masks of 6 training patients" in card
    tuned = panfm.load(tmp_path / "out")
    [again, nobody] = tuned.predict({"brain-mr": [site / "clinic-3-only.nii.gz", None]})
    assert nobody is None
    assert np.array_equal(again.dataobj, written.dataobj)
    export_run(tmp_path / "out", "huggingface", tmp_path / "export")
    [exported] = panfm.load(tmp_path / "export").predict({"brain-mr": site / "clinic-3-only.nii.gz"})
    assert np.array_equal(exported.dataobj, written.dataobj)


def test_sessions_of_a_site_are_not_mixed(labelled_site, make_run):
    site = labelled_site()
    [files] = files_of(site, {"brain-mr": make_run().streams["brain-mr"]}).values()
    assert [path.name for path in files[:3]] == ["clinic-0-1.nii.gz", "clinic-0-2.nii.gz", "clinic-1-only.nii.gz"]


def test_private_runs_are_refused(make_run, write_run, labelled_site, settings_of, tmp_path):
    private = "[patient-dp]\nepsilon = 8.0\ndelta = 1e-3\npublic-subjects = 50\nnoise-multiplier = 1.0\n"
    private += "sample-rate = 0.25\n"
    run = write_run(make_run(private))
    with pytest.raises(ConfigError, match="fine-tuning adds no noise"):
        FinetuneJob.open(settings_of(run, labelled_site()), tmp_path / "out").run()


DEX = SMALL_RUN + '[model]\nbackbone = "director-experts"\n[model.experts]\ncount = 2\nactive = 1\n'


@pytest.mark.parametrize("experts", quick(["private", "pooled"], 1))
def test_experts_stay_what_they_are(make_run, write_run, experts, tmp_path):
    run = make_run(DEX.removeprefix(SMALL_RUN) + f'[sharing]\nexperts = "{experts}"\n')
    folder = write_run(run)
    plain, described = starting_model(folder / "model")
    assert described.model.backbone == ("dense" if experts == "private" else "director-experts")
    site_model = panfm.load(folder).encoder.model
    from panfm.data.store import Batch

    batch = Batch(2, {"eye-fundus": torch.rand(2, 3, 8, 8)}, {"eye-fundus": torch.arange(2)})
    with torch.no_grad():
        assert torch.allclose(plain.eval().embed(batch), site_model.embed(batch), atol=1e-5)
