"""Kind 9: a run goes on as it began: under one description, over one cohort of the same images and labels."""

import shutil
from contextlib import nullcontext

import pytest

from panfm.errors import ConfigError, PanfmError
from panfm.outputs import write_json
from simulations.simulate import simulate
from tests.unit.data.conftest import SiteFolder, volume

RUN = """
name = "run"
[cohort]
kind = "folder"
sites = ["north", "south"]
holdout = "held"
[streams]
brain-mr = { shape = [8, 8, 8], patch = [4, 4, 4], spacing-mm = [2.0, 2.0, 2.0] }
[train]
rounds = 2
"""


@pytest.fixture
def begun(tmp_path, monkeypatch):
    """The folder of a run that was interrupted, beside its description and three places; no round is trained."""
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate(("north", "south", "held")):
        place = SiteFolder(tmp_path / name)
        subjects = range(12 if name == "south" else 6)
        for at in subjects:
            place.add(f"{name}-{at}", voxels=volume(20 * number + at), split="test" if name == "held" else "train")
        more = "\n[limits]\nsmallest-batch = 1\nsmallest-steps = 1\n"
        (place.folder / "site.toml").write_text(f'name = "{name}"\nlabels = "labels.csv"\n{more}')
        rows = [f"{name}-{at},{at % 2}" for at in subjects]
        (place.folder / "labels.csv").write_text("\n".join(["subject,sick", *rows]) + "\n")
    (tmp_path / "run.toml").write_text(RUN)

    def begin(job, _):
        (job.run_dir / "checkpoint").mkdir(exist_ok=True)
        shutil.copy(job.run_dir / "run.toml", job.run_dir / "checkpoint" / "run.toml")

    monkeypatch.setattr("simulations.simulate.sites_alone", lambda *_: nullcontext())
    monkeypatch.setattr("simulations.simulate.finish", lambda *_, **__: None)
    monkeypatch.setattr("simulations.simulate.run_job", begin)
    simulate(tmp_path / "run.toml", ["seed=3"], out=tmp_path / "out")
    return tmp_path


def test_nothing_changed_and_it_goes_on(begun):
    assert simulate(begun / "run.toml", resume=begun / "out") == begun / "out"
    assert simulate(None, resume=begun / "out") == begun / "out"
    (begun / "out" / "data.json").unlink()  # of an earlier version
    assert simulate(None, resume=begun / "out") == begun / "out"


def edit(path, *change):
    path.write_text(path.read_text().replace(*change))


EDITS = {
    "a key of the description": ("run.toml", ("rounds = 2", "rounds = 3"), "train.rounds: found 3, expected 2"),
    "a key that is left out": ("run.toml", ("[train]\nrounds = 2\n", ""), "train.rounds: found 10"),
    "another cohort": ("run.toml", ('"south"]', '"elsewhere"]'), "cohort.sites: found "),
    "a patch": ("run.toml", ("patch = [4, 4, 4]", "patch = [8, 4, 4]"), "streams.brain-mr.patch: found "),
    "the run folder's own": ("out/run.toml", ("rounds = 2", "rounds = 3"), "train.rounds: found 3, expected 2"),
    "its seed": ("out/run.toml", ("seed = 3", "seed = 0"), "seed: found 0, expected 3"),
}


@pytest.mark.parametrize("name", EDITS)
def test_an_edited_description_is_refused_with_its_keys(begun, monkeypatch, name):
    monkeypatch.setattr("simulations.simulate.run_job", lambda *_: pytest.fail("training began"))
    shutil.copytree(begun / "south", begun / "elsewhere")
    edit(begun / "elsewhere" / "site.toml", "south", "elsewhere")
    file, change, why = EDITS[name]
    edit(begun / file, *change)
    with pytest.raises(ConfigError) as caught:
        simulate(begun / "run.toml", resume=begun / "out")
    assert f"{file.rpartition('/')[2]}: differs from the run that began: " in str(caught.value)
    assert why in str(caught.value)
    assert str(caught.value).endswith("start a new run, or go on with more rounds by --extend rounds=N")


@pytest.mark.parametrize("words", [{"overrides": ["train.rounds=3"]}, {"out": "elsewhere"}])
def test_other_words_do_not_go_with_resume(begun, words):
    with pytest.raises(ConfigError, match="does not go with --resume: a run goes on"):
        simulate(begun / "run.toml", resume=begun / "out", **words)


def scan_anew(begun):
    SiteFolder(begun / "south").nifti("south-1_brain-mr.nii.gz", volume(99))


def take_away(begun):
    edit(begun / "south" / "manifest.csv", "south-5,brain-mr,south-5_brain-mr.nii.gz,train,\n", "")


def add(begun):
    place = SiteFolder(begun / "held")
    place.nifti("new.nii.gz", volume(98))
    with (begun / "held" / "manifest.csv").open("a") as file:
        file.write("new,brain-mr,new.nii.gz,test,\n")


QUARANTINE = "subject,stream,path,copy,voxels,reason\nsouth-1,brain-mr,south-1_brain-mr.nii.gz,1,,x\n"
VAL = ("north-5_brain-mr.nii.gz,train", "north-5_brain-mr.nii.gz,val")
CHANGES = {
    "an image": (scan_anew, "images of south"),
    "a row that is gone": (take_away, "images of south"),
    "a new held-out subject": (add, "images of the hold-out"),
    "a split": (lambda at: edit(at / "north" / "manifest.csv", *VAL), "images of north"),
    "a subject": (lambda at: edit(at / "north" / "manifest.csv", "north-5,", "north-7,"), "images of north"),
    "a label": (lambda at: edit(at / "north" / "labels.csv", "north-5,1", "north-5,0"), "labels of north"),
    "rules of labels": (
        lambda at: (at / "held" / "labels.toml").write_text('[sick]\nyes = "1"\n'),
        "labels of the hold-out",
    ),
    "no label table": (lambda at: edit(at / "north" / "site.toml", 'labels = "labels.csv"', ""), "labels of north"),
    "a quarantine": (lambda at: (at / "south" / "quarantine.csv").write_text(QUARANTINE), "images of south"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_other_images_or_labels_are_refused(begun, monkeypatch, name):
    monkeypatch.setattr("simulations.simulate.run_job", lambda *_: pytest.fail("training began"))
    change, why = CHANGES[name]
    change(begun)
    with pytest.raises(PanfmError) as caught:
        simulate(None, resume=begun / "out")
    assert f"{why} differ from those that the run began with" in str(caught.value)
    assert "put them back, or start a new run" in str(caught.value)


def test_a_refused_extension_changes_nothing(begun):
    """The description had the new rounds already when the labels were looked at."""
    before = (begun / "out" / "run.toml").read_bytes(), (begun / "out" / "command.json").read_bytes()
    edit(begun / "north" / "labels.csv", "north-5,1", "north-5,0")
    with pytest.raises(ConfigError, match="labels of north differ"):
        simulate(None, resume=begun / "out", rounds=3)
    assert ((begun / "out" / "run.toml").read_bytes(), (begun / "out" / "command.json").read_bytes()) == before


def test_what_decides_nothing_may_change(begun):
    """The order of rows, the names of files, and limits of a site."""
    manifest = begun / "south" / "manifest.csv"
    header, *rows = manifest.read_text().splitlines()
    (begun / "south" / "south-1_brain-mr.nii.gz").rename(begun / "south" / "moved.nii.gz")
    text = "\n".join([header, *reversed(rows)]) + "\n"
    manifest.write_text(text.replace("south-1_brain-mr.nii.gz", "moved.nii.gz"))
    edit(begun / "south" / "site.toml", "smallest-batch = 1", "smallest-batch = 2")
    assert simulate(None, resume=begun / "out") == begun / "out"


def test_words_of_an_extended_run_are_kept(begun):
    write_json(begun / "out" / "command.json", {"overrides": ["seed=3", "train.rounds=3"]})
    for file in ("out/run.toml", "out/checkpoint/run.toml"):
        edit(begun / file, "rounds = 2", "rounds = 3")
    assert simulate(begun / "run.toml", resume=begun / "out") == begun / "out"
