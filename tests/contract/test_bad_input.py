"""Whatever stands in a file or behind a flag: the tool works, or says what is wrong in lines that each name the place.

Inputs are sound ones with one thing spoilt at random (values, keys, cells, bytes), the same in every run of the tests.
Not a traceback, not an exit status of 0 for what cannot hold, no line broken in two by what it quotes.
"""

import contextlib
import json
import random
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w
from typer.testing import CliRunner

from panfm.cli import main
from panfm.config import dump_toml, load_run, parse_run, parse_site
from panfm.errors import ConfigError, PanfmError
from panfm.evaluate.result import ProbeResult, Score, write_result
from panfm.privacy.ledger import Ledger, Limits
from panfm.sharing.frames import Frame, encode
from panfm.site.audit_log import AuditLog
from server.coordinator import app as server
from tests.federation.conftest import RUN, Federation

pytestmark = pytest.mark.slow
CASES = 200
"""Per kind of file."""
VALUES: tuple[Any, ...] = (
    "", "x", " ", "\x00", "a\nb", "ü" * 300, "../../etc/passwd", "/dev/null", True, False, 0, 1, -1, 2**70, 10**400,
    0.0, -0.5, 1e308, float("inf"), float("nan"), [], [[]], [1, "x"], ["x"] * 50, [-1, 0.5], {}, {"x": 1},
    {"": {"": []}},
)  # fmt: skip
CELLS = ("", " ", "x", "brain-mr", "liver-xx", "../x.nii.gz", "/etc/passwd", "\x00", '"', '"\n"', ",", "\ufeff", "val",
         "TRAIN", "alpha-0", "9" * 200, "\u2028", "=1+1", "nan", "-inf", "1e999", "0x1p3", "\x1b[31m")  # fmt: skip
SOUND_RUN = dump_toml(
    parse_run(f'{RUN}\n[model]\nbackbone = "director-experts"\n[sharing.groups.head]\nmean = "median"\n')
)
PRIVATE = "[patient-dp]\nepsilon = 8.0\ndelta = 1e-3\npublic-subjects = 40\nnoise-multiplier = 1.5\nsample-rate = 0.5\n"
PRIVATE_RUN = dump_toml(parse_run(f'{RUN}\n[objective]\nstandardise = false\n[masking]\npolicy = "random"\n{PRIVATE}'))

FAULT = re.compile(r".: found .+, expected .")
PLACES = ("worker.", "limits.", "ledger", "this site", "train.")
"""Keys that a complaint may name instead of the file."""


def ask(words: list[object]) -> Any:
    """Run `panfm` in this process; a traceback, or a line that names no place, is a failure."""
    found = CliRunner().invoke(main, [str(word) for word in words])
    assert found.exception is None or isinstance(found.exception, SystemExit), repr(found.exception)
    assert "Traceback" not in found.output
    return found


def told(words: list[object], *places: object) -> None:
    """If it does not work: exit status 1, and every line on stderr names one of the places first."""
    found = ask(words)
    lines = found.stderr.split("\n")[:-1]
    assert found.exit_code in (0, 1), found.output
    assert bool(lines) <= (found.exit_code == 1)
    starts = tuple(str(place) for place in places)
    assert [line for line in lines if not line.startswith(starts) and not FAULT.search(line)] == []


def spoil_table(draw: random.Random, table: dict[str, Any]) -> dict[str, Any]:
    """One value of a TOML table replaced, taken out, or added; somewhere in it."""
    found = dict(table)
    key = draw.choice([*found, "unknown"])
    if isinstance(found.get(key), dict) and draw.random() < 0.75:
        found[key] = spoil_table(draw, found[key])
    elif draw.random() < 0.2:
        found.pop(key, None)
    else:
        found[draw.choice([key, key, key, key.upper(), f"{key}-x"])] = draw.choice(VALUES)
    return found


def spoil_bytes(draw: random.Random, content: bytes) -> bytes:
    """Cut off, overwritten, or something put in."""
    at = draw.randrange(len(content) + 1)
    noise = draw.choice([b"\x00", b"\xff\xfe", b"[", b"]]", b'"', b"=", b"\n", draw.randbytes(5), b"[" * 2000])
    return draw.choice(
        [content[:at], content[:at] + noise + content[at + len(noise) :], content[:at] + noise + content[at:]]
    )


def spoil_toml(draw: random.Random, text: str) -> bytes:
    if draw.random() < 0.25:
        return spoil_bytes(draw, text.encode())
    try:
        return tomli_w.dumps(spoil_table(draw, tomllib.loads(text))).encode()
    except (ValueError, TypeError, RecursionError):
        return spoil_bytes(draw, text.encode())


def spoil_csv(draw: random.Random, text: str) -> bytes:
    rows = [line.split(",") for line in text.splitlines()]
    for _ in range(draw.choice([1, 1, 2])):
        row = draw.choice(rows)
        act = draw.randrange(6)
        if act < 3:
            row[draw.randrange(len(row))] = draw.choice(CELLS)
        elif act == 3:
            row.append(draw.choice(CELLS))
        elif act == 4 and len(row) > 1:
            row.pop()
        else:
            rows.insert(draw.randrange(len(rows) + 1), list(draw.choice(rows)))
    content = "\n".join(",".join(row) for row in rows).encode() + b"\n"
    return spoil_bytes(draw, content) if draw.random() < 0.25 else content


@pytest.fixture(scope="module")
def site(tmp_path_factory, write_site) -> Path:
    folder = write_site(tmp_path_factory.mktemp("sites") / "alpha", "alpha", ("brain", "heart"), subjects=4)
    (folder / "run.toml").write_text(SOUND_RUN)
    (folder / "private.toml").write_text(PRIVATE_RUN)
    return folder


def each_case(
    name: str, path: Path, spoil: Callable[[random.Random], bytes], check: Callable[[], None], cases: int = CASES
) -> None:
    """Spoil a file again and again, check, and put it back as it was."""
    sound = path.read_bytes()
    try:
        for number in range(cases):
            content = spoil(random.Random(f"{name} {number}"))
            path.write_bytes(content)
            try:
                check()
            except BaseException as error:
                raise AssertionError(f"{name} {number}: {content[:2000]!r}") from error
    finally:
        path.write_bytes(sound)


@pytest.mark.parametrize("command", ["status", "log", "ledger", "dry-run"])
def test_site_toml(site, command):
    path = site / "site.toml"
    limits = "[limits]\ndelta = 1e-4\nmemory-gib = 1.0\nsmallest-batch = 1\nsmallest-steps = 1\n"
    text = dump_toml(parse_site(f'name = "alpha"\nlabels = "labels.csv"\n{limits}'))
    words = ["ledger", "show", site] if command == "ledger" else ["site", command, site]
    words += ["--run", site / "run.toml"] if command == "dry-run" else []
    cases = CASES // 6 if command == "dry-run" else CASES  # it trains
    each_case(
        f"site.toml {command}", path, lambda draw: spoil_toml(draw, text), lambda: told(words, *PLACES, site), cases
    )


def test_manifest(site):
    path = site / "manifest.csv"
    sound = path.read_text()

    def check() -> None:
        found = ask(["site", "check", site])
        assert found.exit_code in (0, 1)
        below = found.stdout.split("\n")[:-1]
        faults = [line for line in below if FAULT.search(line)]
        assert bool(faults) == (found.exit_code == 1)
        assert not found.stderr
        table = [line for line in below if line not in faults and not line.startswith("note: ")]
        assert all(line.strip()[:1] in "┏┃┡│├└" or line.strip().endswith("subjects") for line in table if line), table

    each_case("manifest.csv", path, lambda draw: spoil_csv(draw, sound), check)


def test_run_toml(site):
    path = site / "run.toml"
    each_case(
        "run.toml",
        path,
        lambda draw: spoil_toml(draw, SOUND_RUN),
        lambda: told(["site", "check", site, "--run", path], path),
    )


def test_private_run_toml(site):
    path = site / "private.toml"
    words = ["site", "check", site, "--run", path]
    each_case("private.toml", path, lambda draw: spoil_toml(draw, PRIVATE_RUN), lambda: told(words, path))


def test_set(site):
    """As the tools read their flags; a few of them through the command that takes the flag."""
    path = site / "private.toml"
    keys = (
        "train.rounds",
        "name",
        "streams.brain-mr.shape",
        "model",
        "model.size",
        "patient-dp.epsilon",
        "a..b",
        "",
        "x=y",
    )
    for number in range(CASES):
        draw = random.Random(f"set {number}")
        value = draw.choice([*CELLS, *map(str, VALUES), "[", "{", '"', "'''", "[1, 2", "{a = 1}", "1979-05-27", "0b1"])
        override = f"{draw.choice(keys)}={value}"
        if number % 50 == 0:
            told(["ledger", "plan", path, "--set", override], path, "override ", "patient-dp.")
        with contextlib.suppress(ConfigError):
            load_run(path, [override])


def test_labels(site, tmp_path):
    from panfm.evaluate.embed import Features, write_features

    subjects = tuple(f"alpha-{number}" for number in range(40))
    random_features = np.random.default_rng(0).random((40, 3), dtype=np.float32)
    splits = ("train",) * 25 + ("test",) * 15
    features, path = tmp_path / "features.npz", tmp_path / "labels.csv"
    write_features(
        features, Features(subjects, splits, ("brain-mr",), np.ones((40, 1), bool), random_features, "cls", "0" * 64)
    )
    text = "subject,age,sick\n" + "".join(f"{name},{20.5 + i},{i % 2}\n" for i, name in enumerate(subjects))
    path.write_text(text)
    each_case(
        "labels.csv",
        path,
        lambda draw: spoil_csv(draw, text),
        lambda: told(["probe", features, "--labels", path, "--bootstrap", 0], path, "split "),
    )
    sound = features.read_bytes()
    each_case(
        "features.npz",
        features,
        lambda draw: spoil_bytes(draw, sound),
        lambda: told(["probe", features, "--labels", path, "--bootstrap", 0], features, path, "split "),
    )


def test_record_of_what_left(site):
    record = AuditLog(site / ".panfm" / "state")
    for reason in ("first", "second", "third"):
        record.append(Frame.error(reason), encode(Frame.error(reason)))
    sound = record.path.read_bytes()
    words = ["site", "log", site]
    each_case("departures.jsonl", record.path, lambda draw: spoil_bytes(draw, sound), lambda: told(words, record.path))


def test_ledger(site):
    run = parse_run(PRIVATE_RUN)
    ledger = Ledger(site / ".panfm" / "ledger", "alpha")
    for number in (1, 2):
        ledger.spend(run, "run-1", number, limits=Limits(8.0, 1e-3), dataset="0" * 16)
    sound = ledger.path.read_bytes()
    words = ["ledger", "verify", site]
    each_case("ledger.jsonl", ledger.path, lambda draw: spoil_bytes(draw, sound), lambda: told(words, ledger.path))
    ledger.path.unlink()


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory, write_site) -> Path:
    """A finished run, probed."""
    federation = Federation(tmp_path_factory.mktemp("runs"))
    for name in ("alpha", "beta"):
        write_site(federation.sites / name, name, ("brain",))
    folder = federation.run("run", "train.rounds=2")
    scores = (Score("federated", "all", "auc", 0.7, 0.6, 0.8, 3), Score("untrained", "age", "r2", 0.1, 0.0, 0.2, 1))
    grid = {"federated": {"auc": 0.7, "auc_missing_1": 0.6, "auc_drop_brain": 0.5}}
    balance = {"federated": {"effective_rank": 3.0}}
    write_result(folder / "probe.json", ProbeResult(scores, grid, balance, {"fit": 20, "test": 10}, ("a note",), grid))
    return folder


def spoil_json(draw: random.Random, value: Any) -> Any:
    """One value somewhere in it replaced or taken out."""
    if isinstance(value, dict) and value and draw.random() < 0.8:
        key = draw.choice(list(value))
        rest = {name: each for name, each in value.items() if name != key}
        return rest if draw.random() < 0.2 else {**rest, key: spoil_json(draw, value[key])}
    if isinstance(value, list) and value and draw.random() < 0.8:
        at = draw.randrange(len(value))
        return [*value[:at], spoil_json(draw, value[at]), *value[at + 1 :]]
    return draw.choice(VALUES)


@pytest.mark.parametrize("name", ["rounds.jsonl", "sites.json", "probe.json", "model/metadata.json"])
def test_run_folder(run_folder, name):
    """As the coordinator's `status` and `panfm report` read it."""
    path = run_folder / name
    text = path.read_text()
    objects = [json.loads(line) for line in (text.splitlines() if name.endswith("l") else [text])]

    def spoil(draw: random.Random) -> bytes:
        if draw.random() < 0.25:
            return spoil_bytes(draw, text.encode())
        at = draw.randrange(len(objects))
        found = [*objects[:at], spoil_json(draw, objects[at]), *objects[at + 1 :]]
        return "".join(f"{json.dumps(each)}\n" for each in found).encode()

    def check() -> None:
        told(["report", run_folder], path)
        found = CliRunner().invoke(server, ["status", str(run_folder)]).exception
        assert found is None or isinstance(found, PanfmError | SystemExit), repr(found)
        assert "\n" not in str(found)

    each_case(name, path, spoil, check, CASES // 2)


COMMANDS = {
    "panfm": ("site init", "site check", "site dry-run", "site status", "site log", "site start",
              "site requests", "site approve", "site reject", "site clean",
              "ledger show", "ledger verify", "ledger plan", "audit step", "audit membership", "audit inversion",
              "embed", "probe", "report", "export"),
    "python -m server": ("start", "hash", "status", "watch", "resume", "stop", "clean", "export"),
    "python -m simulations": ("run", "cohort make", "study dex", "bench aggregate"),
}  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS["panfm"])
def test_flags(command, site, tmp_path):
    """Flags that are unknown, lack their value, or name what is not there."""
    absent = tmp_path / "absent\nfolder"
    for words in (["--unknown"], [absent, "--run"], [absent, absent, absent, absent], [absent, "--run", absent], []):
        found = ask([*command.split(), *words])
        assert found.exit_code in (1, 2), words
        assert found.stderr, words


@pytest.mark.parametrize("command", COMMANDS["python -m server"])
def test_flags_of_the_coordinator(command, tmp_path):
    absent = str(tmp_path / "absent")
    where = {"start": ["--connection", "x"], "export": ["--to", "onnx", "--out", absent]}.get(command, [])
    for words in (["--unknown"], [absent, "--connection"], [absent] * 4, [absent, *where], []):
        found = CliRunner().invoke(server, [command, *words])
        assert isinstance(found.exception, PanfmError | SystemExit), words
        assert found.exit_code in (1, 2), words
        assert found.stderr or "\n" not in str(found.exception), words
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["-m", "simulations", "run", "{run}"], "{run}: train.rounds: found -1, expected a number above 0"),
        (["-m", "simulations", "run", "{run}", "--engine", "x"], "--engine x: expected one of local, ray"),
        (["-m", "simulations", "study", "x"], "x: unknown, expected one of "),
        (
            ["-m", "simulations", "bench", "deployment-overhead", "--json", "/dev/null/x"],
            "--json /dev/null/x: cannot be",
        ),
        (
            ["-c", "from panfm.cli import main; main()", "site", "dry-run", "{site}", "--run", "{run}"],
            "{run}: train.rounds",
        ),
    ],
)
def test_real_processes(site, tmp_path, words, reason):
    run = tmp_path / "run.toml"
    run.write_text(f"{RUN}\n".replace("rounds = 3", "rounds = -1"))
    words = [word.format(run=run, site=site) for word in words]
    done = subprocess.run(
        [sys.executable, *words], cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stdout == ""
    [line] = done.stderr.splitlines()
    assert line.startswith(reason.format(run=run, site=site))
