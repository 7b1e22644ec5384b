"""`PANFM_LOG=json`: every line of the ServerApp's log is one JSON object."""

import json
import logging
from datetime import UTC, datetime

import pytest

from panfm.errors import ConfigError
from panfm.json_log import JsonLines
from server.console import Progress
from server.logged_progress import LoggedProgress, progress_of_environment
from server.tracking import scalars
from tests.unit.report.test_status import line as round_line


@pytest.fixture
def output(monkeypatch, capsys):
    """Reads what a process writes whose environment asks for JSON; the test's own loggers are put back."""
    root, flower = logging.root, logging.getLogger("flwr")
    monkeypatch.setenv("PANFM_LOG", "json")
    for logger, names in ((root, ("level",)), (flower, ("handlers", "propagate"))):
        for name in names:
            monkeypatch.setattr(logger, name, getattr(logger, name))
    yield lambda: [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    for handler in json_handlers():
        root.removeHandler(handler)


def json_handlers():
    return [handler for handler in logging.root.handlers if isinstance(handler.formatter, JsonLines)]


def test_a_round_is_one_object_with_its_numbers(output):
    progress = progress_of_environment()
    done = round_line(3)
    progress.round(5, done)
    told, away = output()
    assert (away["level"], away["message"]) == ("WARNING", "round 3: c offline")
    assert (told["level"], told["logger"], told["round"]) == ("INFO", "server.logged_progress", 3)
    assert told["message"].startswith("round 3/5: loss ")
    assert told["numbers"] == dict(scalars(done))
    assert abs((datetime.now(UTC) - datetime.fromisoformat(told["time"])).total_seconds()) < 60


def test_every_other_line_is_an_object_too(output):
    progress = progress_of_environment()
    progress.privacy("none")
    progress.absent(["north: [red]over\nit\x1b[0m"])
    logging.getLogger("server.rounds").warning("round 2: %s left out: %s", "north", 'a "quote"\nand a line')
    logging.getLogger("flwr").info("Flower's\twords")
    try:
        float("no\nnumber")
    except ValueError:
        logging.getLogger("flwr").exception("failed")
    told = output()
    assert [line["message"] for line in told] == [
        "privacy: none",
        "left out: north: [red]over it?[0m",
        'round 2: north left out: a "quote"\nand a line',
        "Flower's\twords",
        "failed",
    ]
    assert [line["level"] for line in told] == ["INFO", "WARNING", "WARNING", "INFO", "ERROR"]
    assert told[-1]["error"].startswith("Traceback (most recent call last):\n")


def test_numbers_that_are_none_are_null(output):
    progress_of_environment().round(1, {**round_line(1), "seconds": float("nan")})
    told = output()[0]
    assert told["numbers"]["round/seconds"] is None


def test_a_second_run_of_the_process_is_not_told_twice(output):
    progress_of_environment()
    progress = progress_of_environment()
    assert isinstance(progress, LoggedProgress)
    progress.privacy("none")
    assert len(output()) == 1


def test_without_the_variable_nothing_changes(output, monkeypatch):
    monkeypatch.delenv("PANFM_LOG")
    assert type(progress_of_environment()) is Progress
    assert json_handlers() == []


def test_another_form_is_refused(output, monkeypatch):
    monkeypatch.setenv("PANFM_LOG", "xml")
    with pytest.raises(ConfigError, match="PANFM_LOG='xml': expected json, or nothing"):
        progress_of_environment()
