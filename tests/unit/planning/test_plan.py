"""`panfm plan` as a person types it."""

import math

import pytest
from typer.testing import CliRunner

from panfm.cli import main
from panfm.config import load_run
from panfm.planning import plan as planning
from panfm.planning.cost import Cost
from panfm.planning.image_sizes import ImageSize
from panfm.planning.shared_tasks import propose_tasks


def panfm(*words):
    result = CliRunner().invoke(main, [str(word) for word in words], env={"COLUMNS": "200"})
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


@pytest.fixture
def sites(tmp_path, write_site):
    return [write_site(tmp_path / name, name, organs, 9) for name, organs in {"a": ("brain",), "b": ("heart",)}.items()]


@pytest.fixture
def holdout(tmp_path, write_site):
    folder = write_site(tmp_path / "held", "held", ("brain",), 3)
    text = (folder / "manifest.csv").read_text()
    (folder / "manifest.csv").write_text(text.replace(",train", ",test").replace(",val", ",test"))
    return folder


def test_a_short_description_that_holds(tmp_path, sites, holdout):
    out = tmp_path / "My run.toml"
    done = panfm("plan", *sites, "--holdout", holdout, "--out", out, "--minutes", "0.1")
    assert done.exit_code == 0, done.output
    run = load_run(out)
    assert (run.name, set(run.streams)) == ("my-run", {"brain-mr", "heart-mr"})
    assert run.streams["brain-mr"].shape == (8, 8, 8)
    assert run.train.batch_size == 8
    assert 1 <= run.train.rounds <= 200
    assert run.cohort["holdout"] == str(holdout)
    assert len(out.read_text().splitlines()) <= 18
    for words in ("8x8x8", "parameters; batches of 8", "bytes from them", "training subjects: a 8, b 8"):
        assert words in done.output
    again = panfm("plan", *sites, "--out", out)
    assert (again.exit_code, again.stderr) == (1, f"{out}: exists, expected a new file\n")


@pytest.fixture
def quick(monkeypatch):
    """Steps that cost a second in the smallest model, and ten times as much in every larger one."""
    seconds = {"nano": 1.0, "tiny": 10.0, "small": 100.0, "base": 1000.0}

    def cost(run, holders):
        step = seconds[run.model.size]
        return Cost(step, step * run.train.local_steps * len(holders), 1.0, 1, 1)

    monkeypatch.setattr(planning, "measure_cost", cost)


@pytest.mark.parametrize(
    ("minutes", "size", "rounds"), [(1, "nano", 1), (60, "nano", 60), (600, "nano", 200), (1100, "tiny", 110)]
)
def test_the_budget_decides_size_and_rounds(quick, sites, minutes, size, rounds):
    plan = planning.make_plan(sites, name="x", minutes=minutes)
    assert (plan.run.model.size, plan.run.train.rounds) == (size, rounds)
    told = f"{minutes} minutes hold 1 rounds, with the smallest model and the coarsest images; --minutes 10 holds 10"
    assert (told in plan.notes) == (minutes == 1)
    assert plan.run.streams["brain-mr"].shape == (8, 8, 8)


@pytest.mark.parametrize(
    ("minutes", "shape", "told"),
    [
        (120, (64, 64, 32), []),
        (30, (48, 48, 24), ["30 minutes hold 4.6 rounds at full size", "64x64x32 -> 48x48x24 voxels); --minutes 66"]),
        (10, (32, 32, 16), ["10 minutes hold 1.5 rounds at full size"]),
        (0.5, (16, 16, 8), ["(brain-mr 64x64x32 -> 16x16x8 voxels)", "0.5 minutes hold 4.9 rounds, with the smallest"]),
    ],
)
def test_images_are_read_more_coarsely_where_time_is_short(monkeypatch, tmp_path, write_site, minutes, shape, told):
    """A round takes 2 ms per voxel: by hand, 30 minutes hold 30 * 60 / (1.5 * 0.002 * 64 * 64 * 32) = 4.6 rounds."""
    monkeypatch.setattr(planning, "measure_cost", lambda run, holders: of_voxels(run.streams["brain-mr"].shape))
    site = write_site(tmp_path / "a", "a", ("brain",), 9)
    survey = planning.survey_sites([site])
    survey.streams["brain-mr"].sizes[:] = [ImageSize((64, 64, 32), (1.0, 1.0, 1.0))]
    monkeypatch.setattr(planning, "survey_sites", lambda *_: survey)
    plan = planning.make_plan([site], name="x", minutes=minutes)
    assert plan.run.streams["brain-mr"].shape == shape
    notes = [note for note in plan.notes if "minutes hold" in note]
    assert all(words in " ".join(notes) for words in told)
    assert bool(notes) == bool(told)


def of_voxels(shape):
    return Cost(1.0, 0.002 * math.prod(shape), 1.0, 1, 1)


def test_one_site_is_planned_and_told(quick, sites):
    plan = planning.make_plan(sites[:1], name="x")
    assert plan.run.federation.min_sites == 1
    assert plan.notes[0].startswith("one site: federation.min-sites = 1 is written")


def test_a_sites_floors_are_kept(quick, tmp_path, write_site):
    strict = write_site(
        tmp_path / "s", "s", ("brain",), 5, extra="[limits]\nsmallest-batch = 12\nsmallest-steps = 30\n"
    )
    train = planning.make_plan([strict], name="x").run.train
    assert (train.batch_size, train.local_steps) == (12, 30)


def test_a_site_that_would_refuse_is_told(quick, tmp_path, write_site):
    strict = write_site(tmp_path / "s", "s", ("brain",), 5, extra="[limits]\nrounds = 3\n")
    notes = planning.make_plan([strict], name="x").notes
    assert notes[-1] == "site s: this run asks for 20, this site's limits.rounds is 3"


@pytest.mark.parametrize("what", ["no site.toml", "no site.toml in the hold-out", "wrong split"])
def test_a_mistake_is_one_line_and_nothing_is_written(tmp_path, sites, holdout, what):
    (tmp_path / "empty").mkdir()
    words = [tmp_path / "empty"] if what == "no site.toml" else sites
    held = tmp_path / "empty" if "hold-out" in what else holdout
    if what == "wrong split":
        text = (holdout / "manifest.csv").read_text()
        (holdout / "manifest.csv").write_text(text.replace(",test", ",train"))
    done = panfm("plan", *words, "--holdout", held, "--out", tmp_path / "run.toml")
    expected = {
        "no site.toml": "empty/site.toml: no such file, expected a TOML description",
        "no site.toml in the hold-out": "empty: holds no site.toml, expected a site folder; `panfm site init",
        "wrong split": "manifest.csv: no row in split test, expected the held-out subjects' to be",
    }
    assert expected[what] in done.stderr
    assert (done.exit_code, len(done.stderr.splitlines())) == (1, 1)
    assert not (tmp_path / "run.toml").exists()


def test_a_description_that_cannot_be_written_is_told_before_any_image_is_read(tmp_path, sites, monkeypatch):
    monkeypatch.setattr(planning, "survey_sites", lambda *_: pytest.fail("headers were read"))
    done = panfm("plan", *sites, "--out", tmp_path / "nowhere" / "run.toml")
    assert done.stderr.startswith(
        f"{tmp_path / 'nowhere' / 'run.toml'}: cannot be written, expected a file in a folder"
    )


def test_tasks_of_the_probe_stand_in_the_description(quick, tmp_path, sites):
    for folder in sites:
        (folder / "labels.csv").write_text("subject,old\na-0,1\na-1,0\nb-0,1\nb-1,0\n")
        (folder / "site.toml").write_text(f'name = "{folder.name}"\nlabels = "labels.csv"\n{ALLOW}')
    plan = planning.make_plan(sites, name="run")
    assert plan.text.endswith('[probe.tasks]\nold = ["old"]\n')
    assert plan.run.probe.tasks == {"old": ("old",)}


ALLOW = '[limits]\nmay-leave = ["updates", "counts", "label-sums"]\n'
NONE = "no probe of all sites' labels is proposed: "


@pytest.mark.parametrize(
    ("one", "other", "tasks", "note"),
    [
        (
            {"old": "01", "sex": "MF"},
            {"old": "01", "sex": "FM"},
            ["old"],
            "probe.tasks: sex left out: not plain numbers at all sites",
        ),
        ({"old": "01", "age": ["61.5", ""]}, {"old": "10", "age": ["48", "7e1"]}, ["old", "age"], ""),
        ({"old": "01"}, {"sick": "01"}, [], NONE + "no label that all sites have as numbers, such as 0 and 1"),
        ({"old": "yn"}, {"old": "ny"}, [], NONE + "no label that all sites have as numbers"),
        ({"old": ["0", "1_0"]}, {"old": "01"}, [], NONE),
        ({"old": ["0", "na"]}, {"old": "01"}, [], NONE),
        ({"old": ["0", "-999"]}, {"old": ["1", "2.5"]}, [], NONE),
        ({"old": "01"}, None, [], NONE + 'no labels = "labels.csv" in site.toml of b'),
        (None, None, [], ""),
    ],
)
def test_labels_that_all_sites_have_as_numbers_become_tasks(tmp_path, one, other, tasks, note):
    folders = []
    for name, labels in (("a", one), ("b", other)):
        (tmp_path / name).mkdir()
        named = 'labels = "labels.csv"\n' if labels else ""
        (tmp_path / name / "site.toml").write_text(f'name = "{name}"\n{named}{ALLOW}')
        if labels:
            rows = [",".join([f"{name}-{n}", *(column[n] for column in labels.values())]) for n in range(2)]
            (tmp_path / name / "labels.csv").write_text("\n".join([",".join(["subject", *labels]), *rows]) + "\n")
        folders.append(tmp_path / name)
    found, line = propose_tasks(folders)
    assert found == {name: (name,) for name in tasks}
    assert line.startswith(note) if note else line == ""
    assert propose_tasks(folders[:1]) == ({}, "")
    if tasks:
        site = tmp_path / "b" / "site.toml"
        site.write_text(site.read_text().replace(', "label-sums"', ""))
        expected = f'{NONE}{", ".join(tasks)} could be probed with "label-sums" in limits.may-leave of site.toml of b'
        assert propose_tasks(folders) == ({}, f"{expected} (docs/site-operator.md)")
