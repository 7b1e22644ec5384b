"""Mistakes of a first attempt at own data are told before anything is trained, in one line with the way out."""

import shutil
import tomllib
from pathlib import Path

import pytest
import tomli_w
from rich.console import Console
from typer.testing import CliRunner

from panfm.cli import main
from simulations.cohorts.cohort_labels import read_cohort_labels
from simulations.cohorts.prepare import cohort_folder, load_simulation, prepare_cohort
from simulations.preflight import check_before

STREAM = "{ spacing-mm = [8.0, 8.0, 8.0], shape = [8, 8, 8], patch = [4, 4, 8] }"


@pytest.fixture
def attempt(tmp_path, monkeypatch):
    """Two sites, a hold-out with labels at all of them, and a short description; runs `panfm simulate` on it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("simulations.simulate.run_job", lambda *_: pytest.fail("training began"))
    return Attempt(tmp_path)


class Attempt:
    """Images are not there: what is told before training is told without them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("a", "b", "held"):
            (folder / name).mkdir()
            (folder / name / "site.toml").write_text(f'name = "{name}"\nlabels = "labels.csv"\n')
            split = "test" if name == "held" else "train"
            rows = [
                f"{name}-{n},brain-mr,{name}-{n}.nii.gz,{'val' if (split, n) == ('train', 11) else split}"
                for n in range(12)
            ]
            (folder / name / "manifest.csv").write_text("\n".join(["subject,stream,path,split", *rows]) + "\n")
            self.label(name, sick=["0", "1"], sex=["F", "M"])
        self.describe()

    def describe(self, streams=f"brain-mr = {STREAM}", sites=("a", "b"), more=""):
        cohort = {"kind": "folder", "sites": list(sites), "holdout": "held"}
        text = f'name = "first"\n{more}\n{tomli_w.dumps({"cohort": cohort})}\n[streams]\n{streams}\n'
        (self.folder / "run.toml").write_text(text)

    def label(self, name, **values):
        subjects = [f"{name}-{number}" for number in range(12)]
        rows = [",".join([s, *(v[i % len(v)] for v in values.values())]) for i, s in enumerate(subjects)]
        (self.folder / name / "labels.csv").write_text("\n".join([",".join(["subject", *values]), *rows]) + "\n")

    def edit(self, file, change):
        path = self.folder / file
        path.write_text(change(path.read_text()))

    def told(self, *words):
        """The one line of a refusal, after what is told of the label tables where these are its reason."""
        done = CliRunner().invoke(main, ["simulate", "run.toml", "--out", "out", *map(str, words)])
        assert done.exit_code == 1, done.output
        assert not (self.folder / "out").exists()
        *notes, line = done.stderr.splitlines()
        assert not notes or "label" in line
        return line

    def lines(self):
        """What is told of an attempt that would begin."""
        run = load_simulation(self.folder / "run.toml")
        return check_before(run, prepare_cohort(run, Console(quiet=True)))


def test_missing_streams(attempt):
    attempt.edit("run.toml", lambda text: text.partition("[streams]")[0])
    remedy = "a table for each stream, as `panfm plan SITE ... --out run.toml` writes them"
    assert attempt.told() == f"run.toml: streams: missing, expected {remedy}"


def test_a_patch_that_does_not_divide_the_shape(attempt):
    attempt.describe(f"brain-mr = {STREAM.replace('patch = [4, 4, 8]', 'patch = [3, 4, 8]')}")
    assert (
        attempt.told() == "run.toml: streams.brain-mr: patch [3, 4, 8] does not divide shape [8, 8, 8], [2, 4, 8] does"
    )


def test_an_unknown_organ(attempt):
    attempt.describe(more='organs = ["heart"]')
    assert "organ 'brain' is not in organs ['heart'], add it or leave organs out" in attempt.told()


def test_no_stream_of_the_run_at_a_site(attempt):
    attempt.describe(f"brain-ct = {STREAM}")
    assert attempt.told() == "site a: has images of brain-mr only, expected one of the run's: brain-ct"


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


def test_rows_of_the_hold_out_in_the_wrong_split(attempt):
    attempt.edit("held/manifest.csv", lambda text: text.replace(",test", ",train"))
    assert attempt.told().startswith(
        "hold-out: no subject in split test, found 12 in train of the run's streams; write split test in "
    )


def test_rows_of_a_site_in_the_wrong_split(attempt):
    attempt.edit("a/manifest.csv", lambda text: text.replace(",train", ",test"))
    assert attempt.told().startswith("site a: no subject in split train, found 11 in test, 1 in val; write split train")


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


def test_three_classes_that_labels_toml_calls_yes_no(attempt):
    for name in ("a", "b", "held"):
        attempt.label(name, stage=["0", "1", "2"])
    (attempt.folder / "a" / "labels.toml").write_text('[stage]\nkind = "yes-no"\n')
    expected = 'labels.toml: stage: found 3 values (0, 1, 2), expected two; write kind = "classes"'
    assert attempt.told() == expected


def test_sex_as_m_and_f(attempt):
    assert attempt.lines() == ['sex: f is read as 0, m as 1; the other way round, labels.toml: [sex] yes = "f"']


def test_one_site_only(attempt):
    attempt.describe(sites=["a"])
    expected = "federation.min-sites: 2, found 1 site (a); name more sites, or set federation.min-sites = 1"
    assert attempt.told() == expected
    attempt.describe(sites=["a"], more="federation = { min-sites = 1 }")
    assert len(attempt.lines()) == 1


def test_a_code_for_not_known_is_a_question(attempt):
    for name in ("a", "b", "held"):
        attempt.label(name, sick=["0", "1"], smoker=["0", "1", "9"])
    [line] = attempt.lines()
    assert line.startswith("smoker: 12 subjects have 9, far from the others (0 to 1): not known? left out until")
    (attempt.folder / "b" / "labels.toml").write_text('[smoker]\nunknown = ["9"]\n')
    assert attempt.lines() == []


def test_no_label_at_all(attempt):
    for name in ("a", "b", "held"):
        attempt.edit(f"{name}/site.toml", lambda text: text.replace('labels = "labels.csv"', ""))
    assert 'no label to probe, expected labels = "labels.csv" in site.toml' in attempt.told()
    attempt.edit("run.toml", lambda text: text.replace('holdout = "held"', ""))
    assert attempt.lines() == ["no hold-out: the model is not probed"]


def test_too_few_subjects_with_labels(attempt):
    for name in ("a", "b"):
        attempt.edit(f"{name}/labels.csv", lambda text: "\n".join(text.splitlines()[:4]) + "\n")
    assert attempt.told() == "labels: 6 training subjects of the sites have any, expected at least 10 to probe"


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
        "site a: 1 images of brain-ct: left out, the run has no such stream",
        "site a: 1 images of heart-mr: left out, the run has no such stream",
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


def test_a_label_that_only_one_side_knows(attempt):
    attempt.label("held", sex=["F", "M"])
    assert "label sick: 22 training and 0 held-out subjects have it: is not told" in attempt.lines()


def test_a_full_disk_is_told_first(attempt, monkeypatch):
    from shutil import disk_usage

    usage = disk_usage("/")
    monkeypatch.setattr("simulations.preflight.shutil.disk_usage", lambda _: usage._replace(free=1 << 20))
    monkeypatch.setattr("simulations.simulate.prepare_cohort", lambda run, _: prepare_cohort(run, Console(quiet=True)))
    assert attempt.told().startswith("out: found 0.000977 GiB free, expected ")


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
