"""Limits and approvals that change while a worker is at work are in force in its next question."""

import re
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import tomli_w

from client.relay import ask
from panfm.config import load_site, parse_run
from panfm.sharing.frames import Frame, Kind
from panfm.sharing.messages import Invitation, RoundReply
from panfm.site import Site, site
from panfm.site.audit_log import AuditLog
from panfm.site.decisions import WritableApprovals
from panfm.site.worker import Worker, listen
from tests.cases import approve, quick
from tests.conftest import NO_FLOORS
from tests.unit.site.test_site import same, task


@pytest.fixture
def worker(tmp_path, write_site, monkeypatch):
    monkeypatch.setattr(site, "_SETTLE_S", 0.001)
    folder = write_site(tmp_path / "alpha", "alpha", ("brain", "heart"))
    experiment, register = approve(folder, parse_run(task().run_toml)), WritableApprovals(folder, load_site(folder))
    with listen(folder, load_site(folder)) as listener, ThreadPoolExecutor(1) as pool:
        serving = Worker(folder, listener)

        def asked(frame: Frame) -> Frame:
            answer = pool.submit(ask, str(folder / ".panfm" / "run" / "worker.sock"), frame)
            serving.serve_one()
            return answer.result()

        yield SimpleNamespace(ask=asked, folder=folder, register=register, experiment=experiment)


def write(folder, **limits) -> None:
    (folder / "site.toml").write_text(tomli_w.dumps({"name": "alpha", "limits": NO_FLOORS | limits}))


def question(number: int, **words) -> Frame:
    return Frame(Kind.ROUND, task(number, **words).to_records())


def reason(answer: Frame) -> str:
    assert answer.kind is Kind.ERROR
    return answer.records.config["reason"]


def test_a_limit_is_in_force_in_the_next_question_and_the_bits_stay(worker, tmp_path):
    undisturbed = Site(worker.folder, tmp_path / "elsewhere")
    first = RoundReply.from_records(worker.ask(question(1)).records)
    assert first.loss is not None
    write(worker.folder, **{"may-leave": ["updates", "counts"]})
    second = RoundReply.from_records(worker.ask(question(2)).records)
    assert (second.loss, second.saliency) == (None, {})
    write(worker.folder, rounds=5)
    assert "this site's limits.rounds is 5" in reason(worker.ask(question(3)))
    write(worker.folder)
    third = RoundReply.from_records(worker.ask(question(3)).records)
    expected = [undisturbed.train_round(task(number)) for number in (1, 2, 3)]
    assert same(first, expected[0])
    assert same(third, expected[2])


@pytest.mark.parametrize(
    "text", quick(['name = "alpha"\n[limits]\nepsilon = 1.0\n', "", 'name = "alpha"\nlimits', None], 1)
)
def test_nothing_is_answered_under_a_description_that_does_not_hold(worker, text):
    """Whatever its old limits said, until the file is mended."""
    path = worker.folder / "site.toml"
    before = path.read_text()
    assert worker.ask(question(1)).kind is Kind.ANSWER
    path.unlink() if text is None else path.write_text(text)
    for frame in (question(2), Frame(Kind.HANDSHAKE, Invitation(task().run_toml).to_records())):
        told = reason(worker.ask(frame))
        assert told == "site alpha: ConfigError: this site's own description does not hold; its log tells more"
    assert str(path) in (worker.folder / ".panfm" / "state" / "site.log").read_text()
    path.write_text(before)
    assert worker.ask(question(2)).kind is Kind.ANSWER


def test_what_is_read_at_the_start_needs_a_new_start(worker):
    (worker.folder / "site.toml").write_text(tomli_w.dumps({"name": "beta", "limits": NO_FLOORS}))
    assert "ConfigError" in reason(worker.ask(question(1)))
    story = (worker.folder / ".panfm" / "state" / "site.log").read_text()
    assert "site.toml: name: read when the worker starts, expected it to start again" in story


def test_a_file_that_is_being_written_is_read_when_it_is_whole(tmp_path, write_site, monkeypatch):
    folder = write_site(tmp_path / "alpha", "alpha", ("brain",))
    whole = (folder / "site.toml").read_text() + "rounds = 1\n"
    opened = Site(folder)
    (folder / "site.toml").write_text('name = "alpha"\n')
    monkeypatch.setattr(site.time, "sleep", lambda _: (folder / "site.toml").write_text(whole))
    opened.refresh()
    assert opened.config == load_site(folder)
    assert opened.config.limits.rounds == 1


def test_an_approval_that_is_revoked_between_rounds_is_in_force_in_the_next_question(worker):
    assert worker.ask(question(1)).kind is Kind.ANSWER
    worker.register.reject(worker.experiment, by="operator")
    told = f"site alpha: LimitError: experiment {worker.experiment} is rejected by this site's operator"
    for frame in (question(2), question(1), Frame(Kind.HANDSHAKE, Invitation(task().run_toml).to_records())):
        assert reason(worker.ask(frame)) == told
    worker.register.approve(worker.experiment, by="operator")
    assert worker.ask(question(2)).kind is Kind.ANSWER


@pytest.mark.parametrize("change", ["revoke", "limit"])
def test_what_is_revoked_while_a_round_is_trained_does_not_leave(worker, monkeypatch, change):
    real = Site.train_round

    def train(self, asked):
        reply = real(self, asked)
        if change == "revoke":
            worker.register.reject(worker.experiment, by="operator")
        else:
            write(worker.folder, **{"may-leave": ["updates", "counts"]})
        return reply

    monkeypatch.setattr(Site, "train_round", train)
    assert re.search("is rejected by|limits were changed during this question", reason(worker.ask(question(1))))
    [line] = AuditLog(worker.folder / ".panfm" / "state").lines()
    assert (line["kind"], line["arrays"]) == ("error", [])


def test_no_more_rounds_are_answered_than_were_approved(worker):
    """Over all runs of the experiment; a round that is asked again counts once."""
    worker.register.approve(worker.experiment, by="operator", max_rounds=2)
    replies = [RoundReply.from_records(worker.ask(question(number)).records) for number in (1, 2, 2)]
    assert same(replies[1], replies[2])
    told = f"site alpha: PendingApprovalError: experiment {worker.experiment}: this site's approval covers 2 rounds"
    assert reason(worker.ask(question(3))) == told
    assert reason(worker.ask(question(1, run_id="run-2"))) == told
    worker.register.approve(worker.experiment, by="operator", max_rounds=3)
    assert worker.ask(question(3)).kind is Kind.ANSWER


def test_a_description_that_changed_is_another_experiment(worker):
    assert worker.ask(question(1)).kind is Kind.ANSWER
    other = question(2, extra="learning-rate = 0.01\n")
    assert "PendingApprovalError" in reason(worker.ask(other))


def test_a_register_that_does_not_hold_stops_the_site(worker):
    path = worker.register.path
    path.write_text(path.read_text().splitlines(keepends=True)[0])
    told = reason(worker.ask(question(1)))
    assert told == "site alpha: DataError: this site's data or private state is faulty; its log tells more"
    assert "approvals.jsonl: missing, foreign or cut off" in (worker.folder / ".panfm/state/site.log").read_text()
