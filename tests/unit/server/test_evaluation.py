"""The server's part of an evaluation at sites: which runs are asked about, and which answers are taken."""

import json

import numpy as np
import pytest
from flwr.common.config import parse_config_args
from typer.testing import CliRunner

from panfm.config import RunConfig, StreamConfig
from panfm.config.site_dp import SiteDpConfig
from panfm.errors import DataError, ProtocolError, RunError
from panfm.report.site_evaluation import ColumnScores, SiteEvaluation, SiteResult, read_evaluation, write_evaluation
from panfm.sharing.sums_messages import SumsReply
from server.coordinator import app
from server.evaluation import _score, check_can_be_evaluated
from server.flower_cli import as_one_word, of_one_word
from server.run_folder import RunFolder

STREAM = StreamConfig(shape=(8, 8), patch=(4, 4))
RUN = RunConfig(name="toy", streams={"brain-mr": STREAM})


def reply(metric="auc", numbers=(0.8, 0.7, 0.9, 1.0), scored=12):
    return SumsReply("run-1", 7, score={metric: np.array(numbers)}, scored=scored)


def test_a_score_is_read():
    told = _score(reply("r2", (-0.2, -1.0, 0.4, 0.0)))
    assert told == SiteResult(metric="r2", value=-0.2, low=-1.0, high=0.4, patients=12, held_out=False)


@pytest.mark.parametrize(
    "bad",
    [
        reply(scored=None),
        reply(scored=0),
        reply(scored=10**12),
        reply("accuracy"),
        reply(numbers=(0.8, 0.7, 0.9)),
        reply(numbers=(0.8, 0.9, 0.7, 1.0)),
        reply(numbers=(-0.1, 0.0, 0.9, 1.0)),
        reply(numbers=(0.8, 0.7, 1.2, 1.0)),
        reply(numbers=(0.8, 0.7, 0.9, 0.5)),
        reply(numbers=(np.nan, 0.7, 0.9, 1.0)),
        SumsReply("run-1", 7, score={"auc": np.ones(4), "r2": np.ones(4)}, scored=3),
        SumsReply("run-1", 7, scored=3),
    ],
)
def test_an_answer_that_is_no_score_is_refused(bad):
    with pytest.raises(ProtocolError):
        _score(bad)


def test_private_runs_and_columns_named_twice_are_not_asked_about():
    private = RUN.model_copy(
        update={"site_dp": SiteDpConfig(epsilon=8.0, delta=0.01, num_sites=2, noise_multiplier=2.0)}
    )
    with pytest.raises(RunError, match=r"^a private run \(.*\): exact scores are outside its claim"):
        check_can_be_evaluated(private, ["old"])
    for columns in ([], [""], ["old", "old"]):
        with pytest.raises(RunError, match="expected one or more columns"):
            check_can_be_evaluated(RUN, columns)


def test_a_run_that_has_not_finished_is_told_before_flower_is_asked(tmp_path):
    RunFolder.create(tmp_path / "run", RUN)
    result = CliRunner().invoke(app, ["evaluate", str(tmp_path / "run"), "--task", "old"])
    assert result.exit_code == 1
    assert str(result.exception).endswith("run: not begun, expected a run that has finished")


@pytest.fixture
def finished(tmp_path, monkeypatch):
    """A run folder with a model, and a Flower that runs nothing: what it was asked, and what it says afterwards."""
    RunFolder.create(tmp_path / "run", RUN)
    (tmp_path / "run" / "model").mkdir()
    (tmp_path / "run" / "model" / "metadata.json").write_text('{"rounds": 7}')
    asked, answers = [], [("running", "no details"), ("finished:completed", "no details")]
    monkeypatch.setattr("server.coordinator.submit", lambda where, words, _: asked.append((where, words)) or "7")
    monkeypatch.setattr(
        "server.coordinator.FlowerRun.entry", lambda *_: answers.pop(0) if len(answers) > 1 else answers[0]
    )
    monkeypatch.setattr("server.coordinator._POLL_S", 0.0)
    return tmp_path / "run", asked, answers


def test_the_command_asks_flower_and_prints_the_columns_that_it_asked_for(finished):
    run_dir, asked, _ = finished
    score = SiteResult(metric="auc", value=0.81, low=0.7, high=0.9, patients=12, held_out=True)
    given = {name: ColumnScores(sites={"alpha": score}, left_out={"beta": "offline"}) for name in ("old", "grade")}
    write_evaluation(run_dir, SiteEvaluation(columns=given))
    result = CliRunner().invoke(app, ["evaluate", str(run_dir), "--task", "old", "--connection", "here"])
    assert result.exit_code == 0, result.output
    assert asked == [("here", {"run-dir": str(run_dir.resolve()), "evaluate": "old"})]
    assert "AUC 0.81 [0.70, 0.90]" in result.output
    assert "left out: old: beta: offline" in result.output
    assert "grade" not in result.output


def test_a_failed_evaluation_fails_the_command_with_its_reason(finished):
    run_dir, _, answers = finished
    answers[:] = [("finished:failed", "Task failed")]
    write_evaluation(run_dir, SiteEvaluation(failure="1 of at least 2 sites online after 60 s"))
    result = CliRunner().invoke(app, ["evaluate", str(run_dir), "--task", "old", "--connection", "here"])
    assert result.exit_code == 1
    assert str(result.exception) == f"{run_dir}: 1 of at least 2 sites online after 60 s"
    without = CliRunner().invoke(app, ["evaluate", str(run_dir), "--task", "old"])
    assert "name a --connection" in str(without.exception)


def test_the_file_is_read_as_it_was_written_and_a_damaged_one_is_told(tmp_path):
    score = SiteResult(metric="auc", value=1.0, low=0.5, high=1.0, patients=12, held_out=True)
    evaluation = SiteEvaluation(columns={"old": ColumnScores(sites={"alpha": score}, left_out={"beta": "offline"})})
    write_evaluation(tmp_path, evaluation)
    assert read_evaluation(tmp_path) == evaluation
    assert evaluation.rows() == [("old", "alpha", "AUC 1.00 [0.50, 1.00]", "12", "held out")]
    assert evaluation.left_out() == ["old: beta: offline"]
    assert evaluation.only(["grade"]).columns == {}
    (tmp_path / "evaluation.json").write_text('{"columns": {"old": 3}}')
    with pytest.raises(DataError, match=r"evaluation\.json: not what an evaluation writes there"):
        read_evaluation(tmp_path)


def test_names_of_columns_pass_through_a_run_config_of_flower():
    for columns in (["old"], ["old age", "x,y", "50%"], ['a"b', "c'd", "e=f", "größe"]):
        words = {"run-dir": "/srv/x y", "evaluate": as_one_word(columns)}
        text = " ".join(f"{key}={json.dumps(value)}" for key, value in words.items())
        assert of_one_word(parse_config_args([text])["evaluate"]) == columns
