import time
from contextlib import ExitStack
from unittest.mock import Mock

import pytest

from panfm.errors import RunError
from server import console
from server.run_folder import RunFolder


class Flower:
    """Answers one question after another; an error is raised, and a function is called first."""

    def __init__(self, *answers):
        self.answers = list(answers)

    def entry(self, _environment):
        answer = self.answers.pop(0)
        if callable(answer):
            answer()
            answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


@pytest.fixture
def folder(tmp_path, make_run, monkeypatch):
    monkeypatch.setattr(console, "_POLL_S", 0.0)
    monkeypatch.setattr(console, "_STATUS_S", -1.0)
    return RunFolder.create(tmp_path / "run", make_run())


def test_a_superlink_that_does_not_answer_does_not_end_the_watch_of_a_run_at_work(folder, caplog):
    """As one that is started again: the run goes on meanwhile."""
    away = RunError("flwr list: does not answer")
    with ExitStack() as work:
        work.enter_context(folder.at_work())
        flower = Flower(away, away, ("running", "no details"), work.close, ("finished:failed", "killed"))
        with pytest.raises(RunError, match="not begun after 0 of 2 rounds; Flower: finished:failed: killed"):
            console.follow(folder.path, lambda _: None, flower, {})
    assert not flower.answers
    assert caplog.messages == ["flwr list: does not answer; the run goes on"] * 2


def test_a_superlink_that_does_not_answer_ends_the_watch_of_a_run_at_rest(folder):
    with pytest.raises(RunError, match=r"^flwr list: does not answer$"):
        console.follow(folder.path, lambda _: None, Flower(RunError("flwr list: does not answer")), {})


def test_a_superlink_that_is_gone_for_good_ends_the_watch_though_the_run_waits_for_it(folder, monkeypatch):
    monkeypatch.setattr(console, "_SILENCE_S", 0.05)
    flower, begin = Mock(), time.monotonic()
    flower.entry.side_effect = RunError("flwr list: does not answer")
    with folder.at_work(), pytest.raises(RunError, match=r"^flwr list: does not answer$"):
        console.follow(folder.path, lambda _: None, flower, {})
    assert time.monotonic() - begin > 0.05
    assert flower.entry.call_count > 1
