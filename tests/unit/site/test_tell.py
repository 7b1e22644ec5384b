"""What the operator is told by `panfm site dry-run`, `status` and `log`."""

import json
import os
import re
import shlex
import stat
import subprocess
import tomllib
from dataclasses import replace
from datetime import date, datetime
from pathlib import Path

import pytest
from typer.testing import CliRunner

from panfm.cli import main
from panfm.cli.request_lines import Experiments, login_name
from panfm.cli.site_health import certificate_end, next_round
from panfm.cli.worker_command import supernode_command
from panfm.config import Releasable, dump_toml, experiment_hash, load_site, parse_run
from panfm.config.site_description import LimitsConfig
from panfm.errors import DataError, LimitError, PendingApprovalError
from panfm.files import read_checked, write_checked
from panfm.sharing.frames import Frame, encode
from panfm.sharing.messages import Invitation
from panfm.site import Site
from panfm.site.audit_log import AuditLog
from panfm.site.dry_run import _sums
from tests.cases import approve
from tests.unit.site.test_site import RUN, task


def run(*words) -> list[str]:
    result = CliRunner().invoke(main, ["site", *map(str, words)])
    assert result.exit_code == 0, result.output
    return result.output.splitlines()


@pytest.fixture
def folder(tmp_path, write_site):
    return write_site(tmp_path / "alpha", "alpha", ("brain", "heart"))


def test_a_dry_run_tells_all_that_would_leave_and_leaves_nothing(folder, tmp_path):
    (tmp_path / "run.toml").write_text(RUN)
    lines = run("dry-run", folder, "--run", tmp_path / "run.toml")
    assert lines[0] == f"experiment {experiment_hash(parse_run(dump_toml(parse_run(RUN))))}: not approved yet"
    text = "\n".join(lines)
    for group in ("backbone", "head", "stream:brain-mr", "stream:heart-mr"):
        assert f"  {group}: float32 [{task().groups[group].size}], {task().groups[group].nbytes} bytes" in text
    assert re.search(r"one local step: [\d.]+ s; at most [\d.]+ GiB", text)
    assert "liver" not in text
    assert not (folder / ".panfm" / "state").exists()


def test_a_dry_run_tells_what_a_run_asks_for_besides_rounds():
    limits = LimitsConfig()
    assert _sums(parse_run(RUN), limits) == ""
    asked = parse_run(RUN + '[probe]\ntasks = { old = ["old"], big = ["big"] }\n[gate]\n')
    labels = "asks after the last round for sums of features and labels: old, big"
    both = f"{labels} and after every round for the measure of its gate (labels)"
    assert _sums(asked, limits) == f"{both}; nothing leaves, limits.may-leave lacks label-sums"
    assert _sums(asked, LimitsConfig(may_leave=tuple(Releasable))) == f"{both}; they leave"
    loss = _sums(parse_run(RUN + '[gate]\nmeasure = "validation-loss"\n'), limits)
    assert loss == "asks after every round for the measure of its gate (validation-loss); they leave"


def test_status_of_a_new_site(folder):
    worker, limits, *_, left, error, disk, authority = run("status", folder)
    assert worker == "alpha: the worker is not running"
    assert limits.startswith("limits in force: may-leave updates, counts, loss, saliency; training-labels none; ")
    assert (left, error) == ("messages that left: 0, 0 bytes", "last error: none")
    assert re.fullmatch(r"free disk: [\d.]+ of [\d.]+ GiB", disk)
    assert authority.startswith("the coordinator's certificate authority: not known here (")


def test_status_of_a_description_that_does_not_hold(folder):
    (folder / "site.toml").write_text('name = "alpha"\n[limits]\nexperiments = []\n')
    result = CliRunner().invoke(main, ["site", "status", str(folder)])
    meaning, fault = result.stderr.splitlines()
    assert result.exit_code == 1
    assert fault.startswith(f"{folder}/site.toml: limits.experiments: is no longer a key; remove the line, and approve")
    assert meaning == f"{folder}/site.toml: the worker answers nothing until this is mended:"


def test_status_tells_approvals_errors_and_who_waits(folder):
    experiment = approve(folder, parse_run(RUN))
    site = Site(folder, needs_approval=True)
    other = parse_run(RUN.replace("seed = 3", "seed = 4"))
    with pytest.raises(PendingApprovalError):
        site.handshake(Invitation(dump_toml(other)))
    for error in (DataError("first"), DataError("second\nline")):
        try:
            raise error
        except DataError as caught:
            site.log_error(caught)
    lines = run("status", folder)
    assert f"experiment {experiment}: approved by operator on {date.today()}" in lines
    assert f"experiments that wait for your decision: 1, see: panfm site requests {folder}" in lines
    [last] = [line for line in lines if line.startswith("last error: ")]
    assert re.fullmatch(r"last error: 20[\d:.T+-]+ line", last)


def test_the_pace_of_a_run_tells_when_it_asks_next():
    def line(number, minute, run_id="run-1", kind="answer"):
        return {"run": run_id, "round": number, "kind": kind, "time": f"2026-01-01T10:{minute:02}:00+00:00"}

    lines = [line(1, 0), line(1, 1), line(2, 5), line(9, 6, "run-2"), line(3, 9, kind="error"), line(3, 11)]
    assert next_round(lines, "run-2") is None
    due = datetime.fromisoformat("2026-01-01T10:16:00+00:00").astimezone()
    assert next_round(lines, "run-1") == due.isoformat(sep=" ", timespec="minutes")


@pytest.mark.slow
def test_the_end_of_the_certificate_authority(folder):
    credentials = Path(__file__).parents[3] / "configs" / "deployment" / "credentials.sh"
    subprocess.run([credentials, "coordinator", folder, "localhost"], check=True)
    assert re.fullmatch(r"ends 20\d\d-\d\d-\d\d, in 36[45] days", certificate_end(folder, load_site(folder)))
    (folder / "ca.crt").write_text("none")
    assert certificate_end(folder, load_site(folder)).startswith("not known here (")


def asked(folder, text: str) -> str:
    """Have a run ask a site, and be told that it waits; returns its hash."""
    with pytest.raises(PendingApprovalError):
        Site(folder, needs_approval=True).handshake(Invitation(dump_toml(parse_run(text))))
    return experiment_hash(parse_run(text))


def test_requests_are_listed_shown_and_decided(folder):
    assert run("requests", folder) == ["no run has asked this site for anything yet"]
    first, second = asked(folder, RUN), asked(folder, RUN.replace("rounds = 6", "rounds = 9"))
    lines = run("requests", folder)
    assert f"{first} small: 6 rounds, privacy: none" in lines
    assert lines[-1] == f"read it with: panfm site requests {folder} {second[:12]}"
    told = run("approve", folder, first[:12], "--until", "2999-01-02", "--max-rounds", "7", "--name", "Ada")
    words = f"approved by Ada on {date.today()}, until 2999-01-02, for 7 rounds in all"
    assert told == [f"{first} small: 6 rounds, privacy: none", f"  {words}; in force from the next question on"]
    shown = "\n".join(run("requests", folder, second[:8]))
    for part in (
        f"experiment {second}: pending; first asked 20",
        "name small: 9 rounds of 2 local steps, batches of 3",
        "streams: brain-mr, heart-mr, liver-mr",
        f"difference from the last approved, {first[:12]}:\n  train.rounds: 9, was 6\n",
        "privacy: none",
        "one local step: ",
        "every round leave ",
    ):
        assert part in shown
    assert f"  {words}: 0 answered; first asked" in "\n".join(run("requests", folder))
    assert run("reject", folder, first[:12])[1].startswith("  rejected by ")
    assert f"  rejected by {login_name()} on {date.today()}; first asked" in "\n".join(run("requests", folder))


def test_an_account_without_a_name_decides_by_its_number(monkeypatch):
    def fail(error):
        raise error

    monkeypatch.setattr("os.getlogin", lambda: fail(OSError()))
    monkeypatch.setattr("pwd.getpwuid", lambda _: fail(KeyError()))
    assert login_name() == str(os.getuid())


def test_an_approval_that_has_ended_says_so(folder):
    run("approve", folder, "0" * 64, "--until", "2999-01-01")
    known = Experiments(folder, load_site(folder))
    known.decisions["0" * 64] = replace(known.decisions["0" * 64], until=date(2020, 1, 1))
    assert known.state("0" * 64).endswith("until 2020-01-01: has ended")


def test_a_request_that_the_site_would_refuse_is_shown_with_the_reason(folder):
    experiment = asked(folder, RUN)
    (folder / "site.toml").write_text('name = "alpha"\n')
    shown = run("requests", folder, experiment)
    assert any(line.startswith("dry run: this site would refuse it: train.batch-size is 3") for line in shown)
    assert shown[-1].startswith("decide with: panfm site approve ")


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["approve", "FOLDER", "0" * 8], "begins no experiment that was asked for"),
        (["approve", "FOLDER", "run.toml"], "expected 8 to 64 characters"),
        (["approve", "FOLDER", "0" * 64, "--until", "2020-01-01"], "has passed"),
        (["reject", "FOLDER", "0" * 64, "--name", " "], "expected a name"),
        (["requests", "FOLDER", "0" * 64], "no run has asked for it"),
    ],
)
def test_bad_words_are_one_line_and_decide_nothing(folder, words, why):
    result = CliRunner().invoke(main, ["site", *(str(folder) if word == "FOLDER" else word for word in words)])
    [line] = result.stderr.splitlines()
    assert (result.exit_code, why in line) == (1, True), line
    assert not (folder / ".panfm").exists()


def test_clean_removes_the_states_of_runs_that_are_over(folder):
    """States go of a finished, quiet run and of an ended one; notes of their questions and other runs stay."""
    site = Site(folder)
    for run_id, numbers in (("done", (1, 6)), ("fresh", (1, 6)), ("ended", (1,)), ("open", (1,))):
        for number in numbers:
            site.train_round(task(number, run_id=run_id))
        if run_id == "ended":
            run("end", folder, run_id)
    state = folder / ".panfm" / "state"
    path = state / "runs" / "done" / "asked.json"
    write_checked(path, json.dumps(json.loads(read_checked(path)) | {"newest": 0.0}).encode())
    kept = {path for path in folder.rglob("*") if path.suffix in (".jsonl", ".json") or path.name == "ended"}
    refused = CliRunner().invoke(main, ["site", "clean", str(folder)], input="n\n")
    assert refused.exit_code == 1
    assert len(list(state.glob("runs/*/*.state"))) == 6
    assert run("clean", folder, "--yes")[-1].startswith("removed 3 files, ")
    assert {path.parent.name for path in state.glob("runs/*/*.state")} == {"fresh", "open"}
    assert all(path.exists() for path in kept)
    assert run("clean", folder) == ["nothing to remove"]
    with pytest.raises(LimitError, match="has ended it"):
        site.train_round(task(2, run_id="ended"))


def test_files_of_a_site_are_for_its_own_account(tmp_path):
    run("init", tmp_path / "beta", "--name", "beta")
    run("approve", tmp_path / "beta", "0" * 64)
    paths = [tmp_path / "beta", *(tmp_path / "beta").rglob("*")]
    assert {stat.S_IMODE(path.stat().st_mode) for path in paths} == {0o600, 0o700}


def test_log(folder):
    audit_log = AuditLog(folder / ".panfm" / "state")
    frame = Frame.error("site alpha: no")
    audit_log.append(frame, encode(frame), epsilon=1.25)
    line, end = run("log", folder)
    assert "error" in line
    assert line.endswith("epsilon 1.250 spent so far")
    assert end.endswith(next(audit_log.lines())["chain"])
    assert run("log", folder, "--verify") == [end]
    audit_log.path.write_text(audit_log.path.read_text().replace('"bytes": ', '"bytes": 1'))
    result = CliRunner().invoke(main, ["site", "log", str(folder), "--verify"])
    assert (result.exit_code, len(result.stderr.splitlines())) == (1, 1)


def test_an_end_that_was_noted_tells_what_the_chain_cannot(folder):
    """Cut off and accepted, or written anew from some line on: the chain holds, the note does not."""
    audit_log = AuditLog(folder / ".panfm" / "state")
    first, second, forged = (Frame.error(f"site alpha: {reason}") for reason in ("no", "not now", "yes"))
    for frame in (first, second):
        audit_log.append(frame, encode(frame))
    ends = [line["chain"] for line in audit_log.lines()]
    for end in ends:
        assert run("log", folder, "--verify", "--noted", end)[0].startswith("2 messages, unbroken")
    audit_log.path.write_text(audit_log.path.read_text().splitlines(keepends=True)[0])
    result = CliRunner().invoke(main, ["site", "log", str(folder), "--verify"])
    assert result.exit_code == 1
    assert "cut off or removed" in result.stderr
    assert "the audit log does not hold" in " ".join(run("status", folder))
    run("log", folder, "--accept")
    audit_log.append(forged, encode(forged))
    assert "unbroken" in run("log", folder, "--verify")[0]
    result = CliRunner().invoke(main, ["site", "log", str(folder), "--verify", "--noted", ends[1]])
    assert result.exit_code == 1
    assert result.stderr == f"{audit_log.path}: the end noted is not in it, lines were cut off or written anew\n"


def test_the_supernodes_command_survives_a_shell(tmp_path, write_site):
    folder = write_site(tmp_path / "St Mary's", "alpha", ("brain",), extra='[coordinator]\nkey = "my key"\n')
    words = shlex.split(supernode_command(folder, load_site(folder)))
    flags = dict(zip(words[1::2], words[2::2], strict=True))
    assert words[0] == "flower-supernode"
    assert flags["--superlink"] == "coordinator.example.org:443"
    assert flags["--auth-supernode-private-key"] == str(folder / "my key")
    assert flags["--root-certificates"] == str(folder / "ca.crt")
    assert tomllib.loads(flags["--node-config"]) == {"site-socket": str(folder / ".panfm/run/worker.sock")}
