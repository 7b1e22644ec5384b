"""What the operator is told by `panfm site dry-run`, `status` and `log`."""

import re
import shlex
import tomllib

import pytest
import tomli_w
from typer.testing import CliRunner

from panfm.cli import main
from panfm.cli.site_commands import supernode_command
from panfm.config import Releasable, dump_toml, experiment_hash, load_site, parse_run
from panfm.config.site_description import LimitsConfig
from panfm.sharing.frames import Frame, encode
from panfm.site.audit_log import AuditLog
from panfm.site.dry_run import _sums
from tests.conftest import NO_FLOORS
from tests.unit.site.test_site import RUN, task


def run(*words) -> list[str]:
    result = CliRunner().invoke(main, ["site", *map(str, words)])
    assert result.exit_code == 0, result.output
    return result.output.splitlines()


@pytest.fixture
def folder(tmp_path, write_site):
    return write_site(tmp_path / "alpha", "alpha", ("brain", "heart"))


@pytest.mark.parametrize("allowed", [{}, {"experiments": ["0" * 64]}])
def test_a_dry_run_tells_all_that_would_leave_and_leaves_nothing(folder, tmp_path, allowed):
    (folder / "site.toml").write_text(tomli_w.dumps({"name": "alpha", "limits": NO_FLOORS | allowed}))
    (tmp_path / "run.toml").write_text(RUN)
    lines = run("dry-run", folder, "--run", tmp_path / "run.toml")
    assert lines[0].split()[1] == experiment_hash(parse_run(dump_toml(parse_run(RUN))))
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


def test_status(folder):
    assert run("status", folder) == ["alpha: the worker is not running", "messages that left: 0, 0 bytes"]


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
    """Cut off, or written anew from some line on: the chain holds, the note does not."""
    audit_log = AuditLog(folder / ".panfm" / "state")
    first, second, forged = (Frame.error(f"site alpha: {reason}") for reason in ("no", "not now", "yes"))
    for frame in (first, second):
        audit_log.append(frame, encode(frame))
    ends = [line["chain"] for line in audit_log.lines()]
    for end in ends:
        assert run("log", folder, "--verify", "--noted", end)[0].startswith("2 messages, unbroken")
    audit_log.path.write_text(audit_log.path.read_text().splitlines(keepends=True)[0])
    cut = run("log", folder, "--verify")
    audit_log.append(forged, encode(forged))
    for words in (cut, run("log", folder, "--verify")):
        assert "unbroken" in words[0]
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
