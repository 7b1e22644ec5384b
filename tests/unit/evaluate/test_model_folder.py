import pytest

from panfm.errors import DataError
from panfm.evaluate.model_folder import model_folder


def test_a_run_and_its_model_and_an_export_are_the_same_to_a_command(tmp_path):
    for name in ("run/model", "export"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "run.toml").touch()
    (tmp_path / "run" / "run.toml").touch()
    (tmp_path / "run" / "rounds.jsonl").touch()
    assert model_folder(tmp_path / "run") == model_folder(tmp_path / "run" / "model") == tmp_path / "run" / "model"
    assert model_folder(tmp_path / "export") == tmp_path / "export"


def test_a_run_that_has_not_ended_has_no_model(tmp_path):
    for name in ("run.toml", "rounds.jsonl"):
        (tmp_path / name).touch()
    with pytest.raises(DataError, match="found no model/, expected the folder of a finished run"):
        model_folder(tmp_path)


@pytest.mark.parametrize("name", ["absent", "file", "empty"])
def test_what_is_no_folder_of_a_model_is_one_line(tmp_path, name):
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=f"{name}: (no such folder|found no model/), expected the folder of a finished"):
        model_folder(tmp_path / name)
