"""Mistakes of a first attempt at own data are told before anything is trained, in one line with the way out."""

import shutil
import tomllib

import pytest
import tomli_w
from rich.console import Console
from typer.testing import CliRunner

from panfm.cli import main
from server.checkpoint import ServerState
from server.run_folder import RunFolder
from simulations.cohorts.cohort_labels import read_cohort_labels
from simulations.cohorts.prepare import cohort_folder, load_simulation, prepare_cohort
from tests.unit.simulations.conftest import STREAM


def without_streams(attempt):
    attempt.edit("run.toml", lambda text: text.partition("[streams]")[0])


def uneven_patch(attempt):
    attempt.describe(f"brain-mr = {STREAM.replace('patch = [4, 4, 8]', 'patch = [3, 4, 8]')}")


def three_classes_as_yes_no(attempt):
    for name in ("a", "b", "held"):
        attempt.label(name, stage=["0", "1", "2"])
    (attempt.folder / "a" / "labels.toml").write_text('[stage]\nkind = "yes-no"\n')


def sex_as_a_wrong_letter(attempt):
    (attempt.folder / "a" / "labels.toml").write_text('[sex]\nyes = "w"\n')


def task_whose_label_the_hold_out_lacks(attempt):
    attempt.describe(more='task = { label = "sick", kind = "yes-no" }')
    for name in ("a", "b"):
        attempt.edit(f"{name}/site.toml", lambda text: f'{text}[limits]\ntraining-labels = "all"\n')
    attempt.edit("held/labels.csv", lambda text: text.replace(",sick", ",ill"))


def edited_description(attempt):
    """Of a run that began in the folder `begun`."""
    run = load_simulation(attempt.folder / "run.toml")
    folder = RunFolder.create(attempt.folder / "begun", run)
    folder.save_state(ServerState("run-1", 0, {}))
    attempt.edit("begun/run.toml", lambda text: text.replace("seed = 0", "seed = 7"))


MISTAKES = {
    "missing streams": (
        without_streams,
        "run.toml: streams: missing, expected a table for each stream, as `panfm plan SITE ... --out run.toml` writes",
    ),
    "a patch that does not divide": (
        uneven_patch,
        "run.toml: streams.brain-mr: patch [3, 4, 8] does not divide shape [8, 8, 8], [2, 4, 8] does",
    ),
    "an unknown organ": (
        lambda attempt: attempt.describe(more='organs = ["heart"]'),
        "organ 'brain' is not in organs ['heart'], add it or leave organs out",
    ),
    "a stream that no site has": (
        lambda attempt: attempt.describe(f"brain-ct = {STREAM}"),
        "site a: has images of brain-mr only, expected one of the run's: brain-ct",
    ),
    "no site.toml in the hold-out": (
        lambda attempt: (attempt.folder / "held" / "site.toml").unlink(),
        "holds no site.toml, expected a site folder; `panfm site init",
    ),
    "rows of a site in the wrong split": (
        lambda attempt: attempt.edit("a/manifest.csv", lambda text: text.replace(",train", ",test")),
        "site a: no subject in split train, found 11 in test, 1 in val; write split train in ",
    ),
    "rows of the hold-out in the wrong split": (
        lambda attempt: attempt.edit("held/manifest.csv", lambda text: text.replace(",test", ",train")),
        "hold-out: no subject in split test, found 12 in train of the run's streams; write split test in ",
    ),
    "three classes as yes or no": (
        three_classes_as_yes_no,
        'labels.toml: stage: found 3 values (0, 1, 2), expected two; write kind = "classes"',
    ),
    "sex as M and F, and a rule of another letter": (
        sex_as_a_wrong_letter,
        "labels.toml: sex: yes = 'w': no subject has it, expected f, m",
    ),
    "labels without a column of that name": (
        lambda attempt: attempt.edit("a/labels.csv", lambda text: text.replace("subject,", "Subject,")),
        "a/labels.csv: no column subject, found Subject, sick, sex",
    ),
    "a path with backslashes": (
        lambda attempt: attempt.edit(
            "run.toml", lambda text: text.replace('holdout = "held"', r'holdout = "C:\Users"')
        ),
        "(write / in paths, or single quotes)",
    ),
    "a task of a label that no site has": (
        lambda attempt: attempt.describe(more='probe = { tasks = { x = ["sick", "nope"] } }'),
        "probe.tasks.x: no site has sick, nope, found sex, sick in their labels.csv",
    ),
    "a label of [task] that the hold-out lacks": (
        task_whose_label_the_hold_out_lacks,
        "hold-out: task.label: sick",
    ),
    "one site only": (
        lambda attempt: attempt.describe(sites=["a"]),
        "federation.min-sites: 2, found 1 site (a); name more sites, or set federation.min-sites = 1",
    ),
    "an edited description under --resume": (
        edited_description,
        "begun/run.toml: differs from the run that began: seed: found 7, expected 0; start a new run, or go on with",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_each_mistake_is_told_with_what_to_write_instead(attempt, name):
    make, line = MISTAKES[name]
    make(attempt)
    assert line in attempt.told(*(["--resume", "begun"] if "--resume" in name else []))


@pytest.mark.parametrize("how", ["list", "folder"])
def test_no_site_toml_in_the_hold_out(attempt, how):
    (attempt.folder / "held" / "site.toml").unlink()
    if how == "folder":
        (attempt.folder / "sites").mkdir()
        for name in ("a", "b"):
            (attempt.folder / name).rename(attempt.folder / "sites" / name)
        (attempt.folder / "held").rename(attempt.folder / "holdout")
        attempt.edit("run.toml", lambda text: text.replace(text[text.index("sites = [") : text.index("[streams]")], ""))
        attempt.edit("run.toml", lambda text: text.replace('kind = "folder"', 'kind = "folder"\npath = "."'))
    line = attempt.told()
    assert "holds no site.toml, expected a site folder; `panfm site init" in line


def test_three_classes_are_probed_one_by_one(attempt):
    for name in ("a", "b", "held"):
        attempt.label(name, grade=["low", "mid", "high"])
    assert attempt.lines() == ["grade: classes high, low, mid, each probed against the others"]
    labels = read_cohort_labels(cohort_folder(load_simulation(attempt.folder / "run.toml")))
    assert list(labels.info) == ["grade=high", "grade=low", "grade=mid"]


def test_three_classes_where_cohort_toml_says_two(attempt):
    """The description of labels that a cohort's folder had to have."""
    for name in ("a", "b", "held"):
        attempt.label(name, stage=["0", "1", "2"])
    run = load_simulation(attempt.folder / "run.toml")
    folder = prepare_cohort(run, Console(quiet=True))
    (folder / "cohort.toml").write_text('[labels.stage]\nkind = "disease"\n')
    line = attempt.told()
    assert "a/labels.csv: stage: found 2, expected 0, 1 or nothing; for a number write" in line
    assert "for classes leave its [labels] out" in line


def test_sex_as_m_and_f(attempt):
    assert attempt.lines() == ['sex: f is read as 0, m as 1; the other way round, labels.toml: [sex] yes = "f"']


def test_one_site_only(attempt):
    attempt.describe(sites=["a"])
    expected = "federation.min-sites: 2, found 1 site (a); name more sites, or set federation.min-sites = 1"
    assert attempt.told() == expected
    attempt.describe(sites=["a"], more="federation = { min-sites = 1 }")
    assert len(attempt.lines()) == 1


def test_a_task_whose_sums_may_not_leave_is_told(attempt):
    attempt.describe(more='probe = { tasks = { x = ["sick"] } }')
    told = "probe.tasks.x: not fitted, label-sums are not in limits.may-leave of site.toml of a, b"
    assert told in attempt.lines()
    attempt.edit("a/site.toml", lambda text: f'{text}[limits]\nmay-leave = ["updates", "counts", "label-sums"]\n')
    assert told not in attempt.lines()


def test_a_code_for_not_known_is_a_question(attempt):
    for name in ("a", "b", "held"):
        attempt.label(name, sick=["0", "1"], smoker=["0", "1", "9"])
    [line] = attempt.lines()
    assert line.startswith("smoker: 12 subjects with 9, far from the others (0 to 1): not known? left out until")
    (attempt.folder / "b" / "labels.toml").write_text('[smoker]\nunknown = ["9"]\n')
    assert attempt.lines() == []


def test_what_is_left_out_is_told_by_name(attempt):
    def other_stream(text):
        return text.replace("a-3,brain-mr", "a-3,brain-ct").replace("a-4,brain-mr", "a-4,heart-mr")

    attempt.edit("a/manifest.csv", other_stream)
    attempt.edit("b/manifest.csv", lambda text: text.replace("b-0.nii.gz,train", "b-0.nii.gz,test"))
    attempt.edit("b/labels.csv", lambda text: text.replace("b-1,", "B-1,").replace("b-2,", "other,"))
    attempt.edit("held/manifest.csv", lambda text: text.replace("held-0.nii.gz,test", "held-0.nii.gz,val"))
    attempt.describe(f"brain-mr = {STREAM}\nliver-mr = {STREAM}")
    told = attempt.lines()
    for line in (
        "site a: 1 image of brain-ct: left out, the run has no such stream",
        "site a: 1 image of heart-mr: left out, the run has no such stream",
        "site b: 1 subject (b-0) in split test: left out, a site trains on train and validates on val",
        "stream liver-mr: no site has images of it",
        "hold-out: 1 subject (held-0) in split val: left out",
        "a/labels.csv: 2 subjects (a-3, a-4) with a row, but without an image of the run",
        "b/labels.csv: 1 subject (b-2) with images without a row",
        "b/labels.csv: 1 subject (other) with a row, but without an image of the run",
    ):
        assert line in told
    assert len(told) == 9  # and how sex is read


def test_a_label_table_that_site_toml_does_not_name(attempt):
    attempt.edit("b/site.toml", lambda text: text.replace('labels = "labels.csv"', ""))
    expected = 'b/labels.csv: is not read, as site.toml does not name it: labels = "labels.csv"'
    assert any(line.endswith(expected) for line in attempt.lines())


@pytest.mark.parametrize(
    ("cohort", "why"),
    [
        ({"kind": "folder"}, 'expected either path = "FOLDER" or sites = ["SITE", ...]'),
        ({"kind": "folder", "path": ".", "sites": ["a"]}, "expected either path"),
        ({"kind": "folder", "path": ".", "holdout": "held"}, "expected either path"),
        ({"kind": "folder", "sites": ["a", "nowhere"]}, "nowhere: holds no site.toml"),
        ({"kind": "folder", "sites": ["a", "a"]}, "two of the folders have the same name in site.toml"),
    ],
)
def test_sites_are_named_one_way(attempt, cohort, why):
    table = tomllib.loads((attempt.folder / "run.toml").read_text()) | {"cohort": cohort}
    (attempt.folder / "run.toml").write_text(tomli_w.dumps(table))
    assert why in attempt.told()


def test_shapes_follow_from_the_images(attempt, write_site):
    for name in ("a", "b"):
        shutil.rmtree(attempt.folder / name)
        write_site(attempt.folder / name, name, ("brain",), 2)
    attempt.describe('brain-mr = { size = "auto", patch = [4, 8, 8] }')
    run = load_simulation(attempt.folder / "run.toml")
    stream = run.streams["brain-mr"]
    assert (stream.shape, stream.patch, stream.spacing_mm) == ((8, 8, 8), (4, 8, 8), (8.0, 8.0, 8.0))
    attempt.describe('brain-ct = { size = "auto" }')
    expected = 'run.toml: streams.brain-ct.size: "auto", but no site has images of it, found brain-mr'
    assert attempt.told() == expected
    attempt.describe('brain-mr = { size = "auto" }', sites=["a"])
    done = CliRunner().invoke(main, ["site", "check", "a", "--run", "run.toml"])
    assert 'run.toml: streams.brain-mr: size: "auto" is for `panfm simulate`' in done.stderr


def test_auto_needs_sites_to_ask(attempt):
    attempt.describe('brain-mr = { size = "auto" }')
    attempt.edit("run.toml", lambda text: text.replace('kind = "folder"', 'kind = "phantom"'))
    assert 'size = "auto" needs sites to ask, expected [cohort] kind = "folder"' in attempt.told()
