"""Attacks with texts: each is refused with one line, within a time and memory that its length bounds."""

import time
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from flwr.app import Error

from panfm.config import dump_toml, load_run, parse_run
from panfm.errors import ConfigError, ProtocolError, one_line
from panfm.evaluate.probe_labels import read_label_info
from panfm.models import build_model
from panfm.privacy.guarantees import checked_run
from panfm.sharing.frames import Frame, Kind
from panfm.sharing.groups import GroupManifest
from panfm.sharing.messages import Handshake, Records, RoundTask
from panfm.site import Site, answer
from server.handshake import Attendance, read_handshake
from tests.attacks.wire import answer_of
from tests.unit.server.test_handshake import good
from tests.unit.site.test_private_site import PRIVACY, RANDOM, RUN

SECONDS, MIB = 2.0, 200
QUOTES = '"' * 3
HOSTILE = {
    "dotted key": "a." * 11_000 + "a = 1",
    "dotted key of quoted parts": '"a".' * 9_000 + "a = 1",
    "dotted key with spaces": "a . " * 9_000 + "a = 1",
    "dotted header": f"[{'a.' * 11_000}a]",
    "dotted header of a list": f"[[{'a.' * 11_000}a]]",
    "inline tables": "a = " + "{a=" * 11_000,
    "inline tables of dotted keys": "a = " + "{a.a.a.a=" * 3_000,
    "arrays": "a = " + "[" * 60_000,
    "arrays behind a string that looks unfinished": "a = '''" + '"' + "'''\nb = " + "[" * 50_000,
    "arrays behind a comment": '# "\nb = ' + "[" * 50_000,
    "tables in one another": "".join(f"[{'.'.join('a' * depth)}]\n" for depth in range(1, 250)),
    "strings without end": "a = " + QUOTES * 20_000,
    "escapes": f"a = {QUOTES}" + "\\" * 60_000,
    "keys": "".join(f"k{number} = 1\n" for number in range(7_000)),
    "tables": "".join(f"[k{number}]\n" for number in range(7_000)),
    "streams": "".join(f"[streams.organ{number}-mr]\n" for number in range(3_000)),
    "long key": "a" * 60_000 + " = 1",
    "long integer": "seed = " + "9" * 60_000,
    "long hexadecimal": "name = 0x" + "f" * 60_000,
    "more than 64 bits": f"seed = {2**64}",
    "long text": 'name = "' + "a" * 200_000 + '"',
    "long text of wide characters": 'name = "' + "\u4e2d" * 30_000 + '"',
    "shape of many axes": "[streams.brain-mr]\nshape = [" + "8," * 30_000 + "]",
}


@pytest.fixture
def run(make_run):
    return make_run()


@pytest.fixture
def manifest(run):
    model = build_model(run)
    return GroupManifest.of(model.parameter_groups(), model.state_dict())


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_server_sends_a_hostile_description_and_the_site_refuses_it_at_once(text):
    start = time.process_time()
    with pytest.raises(ConfigError) as refusal:
        parse_run(text)
    seconds = time.process_time() - start
    tracemalloc.start()
    with pytest.raises(ConfigError):
        parse_run(text)
    mib = tracemalloc.get_traced_memory()[1] / 2**20
    tracemalloc.stop()
    assert (seconds < SECONDS, mib < MIB) == (True, True), f"{seconds:.1f} s, {mib:.0f} MiB"
    lines = str(refusal.value).splitlines()
    assert len(lines) <= 21
    assert all(len(line) < 1100 and line.startswith("run description: ") for line in lines)


def test_site_answers_the_handshake_with_a_hostile_description_and_the_server_reads_none(run, manifest):
    """Its answer of old held a text that the server parsed: 39 KiB took 17 s and 1.5 GiB."""
    words = dict(good(run, manifest).to_records().config)
    attendance = Attendance()
    for text in ("a." * 11_000 + "a = 1", "[" * 60_000, "\x00", dump_toml(run)):
        start = time.process_time()
        assert (
            read_handshake(answer_of(3, words | {"experiment": text, "run": text}), run, manifest, attendance) is None
        )
        assert time.process_time() - start < SECONDS
    assert len(attendance.misfits + attendance.failed) == 4
    assert all("site a: its software reads the run description differently" in line for line in attendance.misfits)
    assert max(map(len, attendance.misfits + attendance.failed)) < 400


@pytest.mark.parametrize(
    "words",
    [
        {"site": "a" * 10**6},
        {"site": "a\nb"},
        {"experiment": "5" * 10**6},
        {"versions-names": ["panfm", "v" * 10**6], "versions-values": ["1", "2"]},
        {"versions-names": [f"v{n}" for n in range(10**5)], "versions-values": ["1"] * 10**5},
        {"versions-names": ["panfm", "torch"], "versions-values": ["1", "\x1b[2J"]},
        {"groups-names": [f"group-{number:090}" for number in range(5000)], "groups-values": ["x"] * 5000},
        {"groups-names": ["g" * 10**6], "groups-values": ["x"]},
        {"streams-names": [f"stream-{n}" for n in range(50_000)], "streams-values": [1] * 50_000},
        {f"word-{number}": 1 for number in range(10_000)},
        {"subjects": True},
    ],
    ids=lambda words: next(iter(words)),
)
def test_site_sends_long_or_many_words_and_the_server_keeps_one_short_line(run, manifest, words):
    attendance = Attendance()
    sent = dict(good(run, manifest).to_records().config) | words
    start = time.process_time()
    assert read_handshake(answer_of(3, sent), run, manifest, attendance) is None
    assert time.process_time() - start < SECONDS
    (line,) = attendance.failed + attendance.misfits
    assert len(line) < 400
    assert line.isprintable()


def test_site_gives_a_reason_of_megabytes_and_the_server_keeps_one_short_line():
    for reason in ("a " * 10**7, "\x1b[2J" * 10**6, "\n" * 10**7):
        tracemalloc.start()
        start = time.process_time()
        assert len(one_line(Error(1, reason).reason)) <= 300
        assert time.process_time() - start < SECONDS
        assert tracemalloc.get_traced_memory()[1] < 2**20
        tracemalloc.stop()


def test_a_handshake_of_this_version_is_taken(run, manifest):
    shaken = good(run, manifest)
    assert read_handshake(answer_of(3, dict(shaken.to_records().config)), run, manifest, Attendance()) == shaken
    assert Handshake.from_records(replace(shaken, site="b").to_records()).site == "b"


def test_a_cohort_of_others_is_checked_before_it_is_parsed(tmp_path):
    (tmp_path / "cohort.toml").write_text("a." * 11_000 + "a = 1")
    start = time.process_time()
    with pytest.raises(Exception, match=r"cohort\.toml: expected a readable TOML file"):
        read_label_info(tmp_path)
    assert time.process_time() - start < SECONDS


def test_a_description_that_grows_beyond_what_sites_read_is_refused_where_it_is_written(tmp_path):
    names = [f"o{number}" for number in range(800)]
    streams = "".join(f"{name}-fundus = {{ shape = [8, 8], patch = [4, 4] }}\n" for name in names)
    (tmp_path / "run.toml").write_text(f'name = "wide"\norgans = {names}\n[streams]\n{streams}')
    with pytest.raises(ConfigError, match=r"run\.toml: with all defaults: more than 65536 bytes"):
        load_run(tmp_path / "run.toml")


def test_a_description_that_grows_beyond_what_a_site_reads_is_put_down_to_the_server(tmp_path, write_site):
    names = [f"o{number}" for number in range(800)]
    streams = "".join(f"{name}-fundus = {{ shape = [8, 8], patch = [4, 4] }}\n" for name in names)
    site = Site(write_site(tmp_path / "alpha", "alpha", ("brain",)))
    reply = answer(
        site, Frame(Kind.HANDSHAKE, Records(config={"run": f'name = "w"\norgans = {names}\n[streams]\n{streams}'}))
    )
    assert "ProtocolError: run description: with all defaults: more than 65536 bytes" in reply.records.config["reason"]


def test_a_pull_that_no_private_round_does_is_refused():
    with pytest.raises(ConfigError, match=r"train\.proximal-mu: not done in private runs, set 0"):
        checked_run(parse_run(RUN.replace("local-steps = 2", "local-steps = 2\nproximal-mu = 0.1") + RANDOM + PRIVACY))


def test_profile_of_a_task_must_be_finite():
    task = RoundTask("run-1", 1, "", {"backbone": np.zeros(1, np.float32)}, {"brain-mr": float("nan")})
    with pytest.raises(ProtocolError, match="brain-mr is nan"):
        RoundTask.from_records(task.to_records())
