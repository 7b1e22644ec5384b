"""Kind 8: faults that would fail the run after its last round are reported before its first round."""

import os
from types import SimpleNamespace

import pytest
from rich.console import Console

from server.run_folder import RunFolder
from simulations.cohorts.prepare import load_simulation, prepare_cohort


def test_no_label_at_all(attempt):
    for name in ("a", "b", "held"):
        attempt.edit(f"{name}/site.toml", lambda text: text.replace('labels = "labels.csv"', ""))
    assert 'no label to probe, expected labels = "labels.csv" in site.toml' in attempt.told()
    for name in ("a", "b", "held"):
        (attempt.folder / name / "labels.csv").unlink()
    assert attempt.lines() == ["no labels.csv at any site or in the hold-out: the model is not probed"]
    attempt.edit("run.toml", lambda text: text.replace('holdout = "held"', ""))
    assert attempt.lines() == ["no hold-out: the model is not probed"]


def test_too_few_subjects_with_labels(attempt):
    for name in ("a", "b"):
        attempt.edit(f"{name}/labels.csv", lambda text: "\n".join(text.splitlines()[:4]) + "\n")
    assert attempt.told() == "labels: 6 training subjects of the sites have any, expected at least 10 to probe"


def test_a_label_that_only_one_side_knows(attempt):
    attempt.label("held", sex=["F", "M"])
    assert "label sick: 22 training and 0 held-out subjects have it: is not told" in attempt.lines()


def test_a_full_disk_is_told_first(attempt, monkeypatch):
    from shutil import disk_usage

    usage = disk_usage("/")
    monkeypatch.setattr("simulations.preflight.shutil.disk_usage", lambda _: usage._replace(free=1 << 20))
    monkeypatch.setattr("simulations.simulate.prepare_cohort", lambda run, _: prepare_cohort(run, Console(quiet=True)))
    assert attempt.told().startswith("out: found 0.000977 GiB free, expected ")


def test_a_label_with_one_value_among_the_held_out(attempt):
    attempt.label("held", sick=["0"], sex=["F", "M"])
    assert "label sick: 0 for all 12 held-out subjects: its AUC is not told" in attempt.lines()


@pytest.mark.parametrize("column", ["sick", "sex"])
def test_a_label_without_the_hold_out(attempt, column):
    rest = {"sick": ["0", "1"], "sex": ["F", "M"]} | {column: [""]}
    attempt.label("held", **rest)
    assert f"label {column}: 22 training and 0 held-out subjects have it: is not told" in attempt.lines()


def test_a_label_that_no_number_is(attempt):
    for name in ("a", "b", "held"):
        attempt.label(name, sick=["0", "1"], age=["61", "62", "63", "64,5" if name == "b" else "64"])
    attempt.edit("b/labels.csv", lambda text: text.replace("64,5", '"64,5"'))
    assert any(line.startswith("age: 3 numbers with commas or other marks, e.g. '64,5'") for line in attempt.lines())


@pytest.mark.parametrize(
    ("cohort", "text", "why"),
    [
        ("labels.toml", "[nobody]\nkind = 'number'\n", "labels.toml: nobody: no label table has this column, known: "),
        ("labels.toml", "[sick]\nkind = 'maybe'\n", "sick.kind"),
        ("labels.csv", "patient,sick\na-1,0\n", "labels.csv: no column subject"),
        ("labels.csv", "subject,sick\na-1,0\na-1,1\n", "labels.csv:3: found subject 'a-1' again"),
        ("site.toml", 'name = "a"\nlabels = "none.csv"\n', "none.csv: no such file"),
        ("manifest.csv", "subject,path\n", "no column stream"),
        ("site.toml", 'name = "a"\nlabel = "labels.csv"\n', "label"),
    ],
)
def test_files_of_a_site(attempt, cohort, text, why):
    (attempt.folder / "a" / cohort).write_text(text)
    assert why in attempt.told()


def test_the_run_folder_is_looked_at_before_any_image(attempt, monkeypatch, tmp_path):
    """Images are prepared for minutes before the folder is made."""
    monkeypatch.setattr("simulations.simulate.prepare_cohort", lambda *_: pytest.fail("data were read"))
    (tmp_path / "file").write_text("")
    inside = tmp_path / "file" / "out"
    assert attempt.told("--out", inside) == (
        f"{inside}: cannot be made a run folder (NotADirectoryError: Not a directory)"
    )
    (tmp_path / "used" / "checkpoint").mkdir(parents=True)
    assert attempt.told("--out", tmp_path / "used").endswith("holds a run already; resume it or choose another folder")
    with monkeypatch.context() as context:
        context.setattr("panfm.outputs.os", SimpleNamespace(**{**vars(os), "access": lambda *_: False}))
        assert attempt.told().startswith("out: cannot be made a run folder (PermissionError: Permission denied)")


def test_a_logger_that_is_not_installed(attempt, monkeypatch):
    monkeypatch.setattr("server.tracking_config.find_spec", lambda _: None)
    attempt.describe(more='tracking = { loggers = ["mlflow"] }')
    assert "mlflow is not installed, expected: pip install 'panfm[mlflow]'" in attempt.told()


def test_a_folder_in_which_a_run_may_begin(attempt, tmp_path):
    run = load_simulation(attempt.folder / "run.toml")
    RunFolder.check_new(tmp_path / "new" / "run", run)
    RunFolder.check_new(tmp_path, run)
    assert not (tmp_path / "new").exists()
