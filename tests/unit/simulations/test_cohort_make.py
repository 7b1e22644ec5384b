"""`python -m simulations cohort make`, and what it writes through `panfm site check`."""

import pytest
from typer.testing import CliRunner

from panfm.cli import main
from panfm.errors import PanfmError
from simulations.__main__ import app

RUN = """
name = "run"
[streams]
brain-mr = { shape = [8, 8, 8], patch = [4, 4, 4], spacing-mm = [20.0, 20.0, 20.0] }
[cohort]
kind = "phantom"
holdout-subjects = 2
[cohort.sites]
one = { organs = ["brain"], subjects = 9 }
two = { organs = ["brain"], subjects = 9 }
"""


def simulations(*words):
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exception is None or isinstance(result.exception, SystemExit | PanfmError), result.exception
    return result


def panfm(*words):
    return CliRunner().invoke(main, [str(word) for word in words])


@pytest.fixture
def run_file(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(RUN)
    return path


def test_cohort_make_and_check(tmp_path, run_file):
    result = simulations(
        "cohort", "make", tmp_path / "cohort", "--run", run_file, "--subjects", "5", "--preset", "lasting"
    )
    assert (result.exit_code, result.stderr) == (0, "")
    assert 'preset = "lasting"' in (tmp_path / "cohort/cohort.toml").read_text()
    sites, holdout = (tmp_path / "cohort/sites/one", tmp_path / "cohort/sites/two"), tmp_path / "cohort/holdout"
    checked = panfm("site", "check", *sites, "--holdout", holdout, "--run", run_file)
    assert (checked.exit_code, checked.stderr) == (0, "")
    assert checked.output.count("brain-mr") == 3


def test_cohort_make_of_modalities(tmp_path, run_file):
    cohort = '[cohort]\nkind = "modalities"\nholdout-subjects = 2\nheld-out = ["brain-photo"]\n'
    sites = '[cohort.sites]\none = { streams = ["brain-mr"], subjects = 9 }\n'
    streams = "brain-mr = { shape = [8, 8], patch = [4, 4] }\nbrain-photo = { shape = [8, 8], patch = [4, 4] }\n"
    run_file.write_text(f'name = "run"\n{cohort}{sites}[streams]\n{streams}')
    result = simulations("cohort", "make", tmp_path / "cohort", "--run", run_file, "--subjects", "3", "--seed", "4")
    assert (result.exit_code, result.stderr) == (0, "")
    assert "seed = 4" in (tmp_path / "cohort/cohort.toml").read_text()
    for site, images in (("sites/one", 3), ("holdout", 6)):
        checked = panfm("site", "check", tmp_path / "cohort" / site, "--run", run_file)
        assert (checked.exit_code, checked.stderr) == (0, "")
        assert len(list((tmp_path / "cohort" / site / "images").iterdir())) == images


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "run.toml: cohort is missing, a simulation takes its sites from it"),
        ('[cohort]\nkind = "folder"\npath = "x"\n', "cohort.path: x exists already, expected a cohort to write"),
    ],
)
def test_cohort_make_needs_a_cohort_to_write(tmp_path, run_file, text, complaint):
    run_file.write_text(RUN.split("[cohort]")[0] + text)
    result = simulations("cohort", "make", tmp_path / "cohort", "--run", run_file)
    assert result.exit_code == 1
    assert complaint in str(result.exception)
    assert not (tmp_path / "cohort").exists()


def test_cohort_make_inside_a_file(run_file):
    result = simulations("cohort", "make", run_file / "c", "--run", run_file)
    assert result.exit_code == 1
    assert len(str(result.exception).splitlines()) == 1
    assert str(result.exception).startswith(f"{run_file}/c: cannot be made")


@pytest.mark.parametrize("flags", [["--preset", "nice"], ["--seed", "x"], ["--subjects", "0"]])
def test_cohort_make_refuses_bad_flags(tmp_path, run_file, flags):
    result = simulations("cohort", "make", tmp_path / "cohort", "--run", run_file, *flags)
    assert result.exit_code != 0
    assert not (tmp_path / "cohort").exists()


def test_cohort_make_refuses_flags_that_are_unknown_or_name_what_is_not_there(tmp_path):
    absent = tmp_path / "absent\nfolder"
    for words in (["--unknown"], [absent, "--run"], [absent] * 4, [absent, "--run", absent], []):
        result = simulations("cohort", "make", *words)
        assert result.exit_code in (1, 2), words
        assert result.stderr or isinstance(result.exception, PanfmError), words
    assert not list(tmp_path.iterdir())


def test_a_site_may_have_dots_in_its_name(tmp_path, run_file):
    run_file.write_text(RUN.replace("two =", '"two.b" ='))
    result = simulations("cohort", "make", tmp_path / "cohort", "--run", run_file, "--subjects", "2")
    assert (result.exit_code, result.stderr) == (0, "")
    assert len((tmp_path / "cohort" / "sites" / "two.b" / "labels.csv").read_text().splitlines()) == 3


def test_patients_per_site_of_a_cohort_that_has_no_such_number(tmp_path, run_file):
    run_file.write_text(RUN.split("[cohort]")[0] + '[cohort]\nkind = "real-images"\n')
    result = simulations("cohort", "make", tmp_path / "cohort", "--run", run_file, "--subjects", "2")
    assert "cohort.sites: unknown key, did you mean cohort.seed?" in str(result.exception)
