"""Two thousand hostile messages at a site's worker, and as many at the server: each is answered or refused within 2 s
and 200 MiB, in one short line, and the next sound one is taken."""

import json
import random
import resource
import socket
import struct
import time
import tomllib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tomli_w
from flwr.app import Array, ArrayRecord, Error, Message, RecordDict

from panfm.config import dump_toml, parse_run
from panfm.models import build_model
from panfm.outputs import json_text
from panfm.sharing.frames import MAX_ARRAYS, MAX_WORDS, Frame, Kind, address, decode, encode
from panfm.sharing.groups import GroupManifest
from panfm.sharing.messages import Invitation, Records
from panfm.sharing.npy import to_npy
from panfm.site import Site
from panfm.site.worker import Worker, listen
from server.exchange import Exchange
from server.handshake import Attendance, read_handshake
from tests.attacks.wire import answer_of
from tests.unit.server.test_handshake import good
from tests.unit.site.test_site import RUN, task
from tests.unit.strategies.test_grouped import ROSTER, build, message, reply

SECONDS, MIB = 2.0, 200
COUNTS = [pytest.param(60, id="60"), pytest.param(2000, id="2000", marks=[pytest.mark.slow, pytest.mark.long])]
PRIVATE = (
    '[objective]\nstandardise = false\n[masking]\npolicy = "random"\n[patient-dp]\nepsilon = 8.0\ndelta = 1e-3\n'
    "public-subjects = 40\nnoise-multiplier = 1.5\nsample-rate = 0.5\n"
)
DEX = '[model]\nbackbone = "director-experts"\n[sharing]\ncoding = "int8"\n'
RUNS = [tomllib.loads(dump_toml(parse_run(RUN + extra))) for extra in ("", DEX, PRIVATE)]
INTEGERS = (0, -1, 1, 2, 7, 4096, 65_536, 10**6, 10**9, 2**31, 2**53, 2**62, 2**63 - 1, -(2**63))
VALUES: tuple[Any, ...] = (
    *INTEGERS, 0.0, -0.5, 1e-38, 1e-3, 0.5, 1e3, 1e12, 1e308, float("inf"), float("nan"), True, "", "x", "a\nb", "\x00",
    "\u4e2d" * 5000, "x" * 40_000, "../../etc/passwd", [], [[]], [1, "x"], [0] * 9000, ["x"] * 5000, [2**40] * 3,
    {}, {"x": 1}, {f"k{number}": number for number in range(3000)}, {"brain-mr": {}},
)  # fmt: skip


@contextmanager
def within_bounds(words: object) -> Iterator[None]:
    start, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    seconds = time.process_time() - start
    mib = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert (seconds < SECONDS, mib < MIB) == (True, True), f"{seconds:.1f} s, {mib:.0f} MiB for {words!r:.2000}"


def spoilt(draw: random.Random, table: dict[str, Any], values: tuple[Any, ...] = VALUES) -> dict[str, Any]:
    """One value somewhere in a table replaced, taken out, or added."""
    table = dict(table)
    key = draw.choice([*table, "unknown"])
    if isinstance(table.get(key), dict) and table[key] and draw.random() < 0.85:
        table[key] = spoilt(draw, table[key], values)
    elif draw.random() < 0.1:
        table.pop(key, None)
    elif isinstance(value := table.get(key), list) and value and draw.random() < 0.5:
        table[key] = [draw.choice(values) if draw.random() < 0.5 else each for each in value]
    else:
        table[key] = draw.choice(values)
    return table


def description(draw: random.Random) -> str:
    """A run description with up to three values spoilt, or a text that is hardly one."""
    table = draw.choice(RUNS)
    for _ in range(draw.choice((0, 1, 1, 1, 2, 3))):
        table = spoilt(draw, table)
    text = tomli_w.dumps(table)
    match draw.randrange(12):
        case 0:
            return text + draw.choice(
                ("a." * 9000 + "a = 1", "a = " + "[" * 9000, "[a]\n" * 9000, "a = " + "{a=" * 9000)
            )
        case 1:
            place = draw.randrange(len(text))
            return text[:place] + draw.choice(('"', "[", "}", "\x00", "'''", "\\", "\u2028")) + text[place + 1 :]
        case 2:
            return text[: draw.randrange(len(text))]
        case 3:
            return text * draw.randrange(2, 40)
    return text


def spoilt_arrays(draw: random.Random, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    arrays = {name: array.copy() for name, array in arrays.items()}
    name = draw.choice(list(arrays))
    match draw.randrange(8):
        case 0:
            arrays[name][draw.randrange(arrays[name].size)] = draw.choice((np.nan, np.inf, 3e38, -1e-45))
        case 1:
            arrays[name] = arrays[name][: draw.randrange(arrays[name].size)]
        case 2:
            arrays[name] = np.zeros(draw.choice((0, 1, 10**6)), draw.choice((np.int8, np.uint16, np.float32)))
        case 3:
            del arrays[name]
        case 4:
            arrays[draw.choice(("x" * 300, "", "head/teacher", "../x", "\ud800", "backbone/scale"))] = arrays[name]
        case 5:
            arrays |= {f"group-{number}": np.zeros(1, np.float32) for number in range(draw.choice((5, 5000)))}
    return arrays


def question(draw: random.Random, sound: dict[str, np.ndarray]) -> bytes:
    """The bytes of one hostile question."""
    if draw.random() < 0.25:
        return encode(Frame(Kind.HANDSHAKE, Invitation(description(draw)).to_records()))
    config: dict[str, Any] = {"run-id": "run-1", "round": 1, "run": dump_toml(parse_run(RUN))}
    if draw.random() < 0.4:
        config["run"] = description(draw)
    else:
        names = draw.choice((["brain-mr"], ["x"] * 3, ["a" * 300], [f"s{number}" for number in range(9000)]))
        config |= {
            "profile-names": names,
            "profile-values": [draw.choice((float("nan"), 1.0, -1.0, 1e308))] * len(names),
        }
    if draw.random() < 0.7:
        config = spoilt(draw, config, (*VALUES[:-5], 10**30, 10**4000, "run-\ud800", "a/b", f"run-{draw.random()}"))
    arrays = spoilt_arrays(draw, sound) if draw.random() < 0.7 else sound
    try:
        content = encode(Frame(draw.choice((Kind.ROUND, Kind.ROUND, *Kind)), Records(arrays, {}, config)))
    except (TypeError, UnicodeEncodeError, ValueError):
        return question(draw, sound)
    return damaged(draw, content) if draw.random() < 0.3 else content


def damaged(draw: random.Random, content: bytes) -> bytes:
    """A frame with its header, its words or its end spoilt."""
    header, body = struct.Struct("<8sQQ"), content[24:]
    words, arrays = draw.choice(INTEGERS[:-1]), draw.choice(INTEGERS[:-1])
    match draw.randrange(7):
        case 0:
            return content[: draw.randrange(len(content))]
        case 1:
            return header.pack(b"PANFM/1\n", abs(words), abs(arrays)) + body
        case 2:
            return header.pack(b"PANFM/1\n", MAX_WORDS, MAX_ARRAYS) + body
        case 3:
            text = draw.choice(("[", '{"a":', "0,", '"', "{}", "[[],")).encode() * 200_000
            return header.pack(b"PANFM/1\n", len(text), 0) + text
        case 4:
            text = b"[" + b"{}," * 300_000 + b"{}]"
            return header.pack(b"PANFM/1\n", len(text), 0) + text
        case 5:
            layout = [["a", "float32", draw.choice((-1, 10**18, 10**400, 1.5, True, None))]] * draw.choice((1, 2, 9000))
            text = json.dumps({"kind": "round", "arrays": layout, "metrics": {}, "config": {}}).encode()
            return header.pack(b"PANFM/1\n", len(text), 4) + text + bytes(4)
    return bytes(draw.randrange(256) for _ in range(draw.randrange(200)))


@pytest.fixture
def worker(tmp_path, write_site):
    """A worker, asked from another thread: limits on time need this one."""
    folder = write_site(tmp_path / "alpha", "alpha", ("brain", "heart"))
    with listen(folder, Site(folder).config) as listener, ThreadPoolExecutor(1) as pool:
        worker, path = Worker(folder, listener), folder / ".panfm" / "run" / "worker.sock"
        worker.site = Site(folder)  # needs no approval, which would stop most questions at once

        def ask(content: bytes) -> bytes:
            with socket.socket(socket.AF_UNIX) as connection, address(path) as short:
                connection.connect(short)
                try:
                    connection.sendall(content)
                    connection.shutdown(socket.SHUT_WR)
                    return b"".join(iter(lambda: connection.recv(1 << 20), b""))
                except ConnectionError:  # it was hung up on before all of it was read
                    return b""

        def serve(content: bytes) -> bytes:
            answer = pool.submit(ask, content)
            worker.serve_one()
            return answer.result()

        yield SimpleNamespace(ask=serve, site=worker.site)


@pytest.mark.parametrize("count", COUNTS)
def test_server_sends_hostile_questions_and_the_worker_goes_on(worker, count):
    draw, sound = random.Random(count), task().groups
    valid = encode(Frame(Kind.HANDSHAKE, Invitation(task().run_toml).to_records()))
    for warm in (valid, encode(Frame(Kind.ROUND, task().to_records()))):
        assert decode_all(worker.ask(warm)).kind is Kind.ANSWER
    limits = worker.site.config.limits.model_copy(update={"seconds_per_round": 1.0})
    worker.site.config = worker.site.config.model_copy(update={"limits": limits})
    kinds = {Kind.ANSWER: 0, Kind.ERROR: 0, None: 0}
    for _ in range(count):
        content = question(draw, sound)
        with within_bounds(content):
            answer = decode_all(worker.ask(content))
        kinds[answer and answer.kind] += 1
        if answer and answer.kind is Kind.ERROR:
            reason = str(answer.records.config["reason"])
            assert len(reason) < 300
            assert len(reason.splitlines()) == 1
    assert min(kinds.values()) > 0, kinds
    assert decode_all(worker.ask(valid)).kind is Kind.ANSWER


def decode_all(content: bytes) -> Frame | None:
    if not content:
        return None
    num_words = struct.unpack_from("<Q", content, 8)[0]
    return decode(content[24 : 24 + num_words], content[24 + num_words :])


WORDS: tuple[Any, ...] = (
    0, -1, True, 2**62, -(2**63), 0.5, float("nan"), float("inf"), 1e308, "", "x", "a\nb", "\x1b[2J", "x" * 10**6, b"x",
    "a " * 10**5, [], [0] * 10**5, [-1.0], [float("nan")], ["x"] * 10**5, ["x" * 10**5], [2**62], [True], ["\x00"],
)  # fmt: skip
NUMBERS: tuple[Any, ...] = (0, -1, 2**62, 0.5, float("nan"), float("inf"), -1e308, [], [0.0] * 10**5, [float("nan")],
                            [-1.0], [1e308], [2**62])  # fmt: skip


def spoilt_words(draw: random.Random, table: dict[str, Any], values: tuple[Any, ...]) -> dict[str, Any]:
    table = dict(table)
    for _ in range(draw.choice((0, 1, 1, 2))):
        key = draw.choice([*table, "x", "x" * 10**5, "weight/backbone", "saliency/brain-mr", "weight/" + "y" * 9999])
        if draw.random() < 0.15:
            table.pop(key, None)
        else:
            table[key] = draw.choice(values)
    if draw.random() < 0.03:
        table |= {f"saliency/s{number}": 1 for number in range(20_000)}
    return table


@pytest.mark.parametrize("count", COUNTS)
def test_sites_send_hostile_handshakes_and_the_server_keeps_short_lines(make_run, count):
    draw, run = random.Random(count), make_run()
    model = build_model(run)
    manifest = GroupManifest.of(model.parameter_groups(), model.state_dict())
    sound = dict(good(run, manifest).to_records().config)
    accepted = 0
    for _ in range(count):
        sent = answer_of(3, spoilt_words(draw, sound, WORDS))
        attendance = Attendance()
        with within_bounds(sent.content):
            accepted += read_handshake(sent, run, manifest, attendance) is not None
        for line in attendance.failed + attendance.misfits:
            assert len(line) < 400
            assert line.isprintable()
    assert 0 < accepted < count


def spoilt_npy(draw: random.Random, array: np.ndarray) -> Array:
    """An array of a record whose bytes, or words about them, are not what they should be."""
    data, stype = to_npy(array), "numpy.ndarray"
    match draw.randrange(10):
        case 0:
            data = data[: draw.randrange(len(data))]
        case 1:
            data = bytes(draw.randrange(256) for _ in range(draw.randrange(300)))
        case 2:
            stype = draw.choice(("pickle", "", "x" * 10**5))
        case 3:
            shape = draw.choice(
                ("(99999999999,)", "(-1,)", "()", "(2, 0)", "(1e9,)", "((" * 400, "(" + "1," * 400 + ")")
            )
            data = _npy(f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}}}")
        case 4:
            kind = draw.choice(("|O", "<M8[s]", "|V0", "<U9", "<c16", "|b1", "<f8", ">f4", "<f2", "[('a', '<f4')]"))
            data = _npy(f"{{'descr': '{kind}', 'fortran_order': True, 'shape': (2,)}}")
        case 5:
            data = _npy("{" + "'a':{" * 5000)
        case 6:
            data = to_npy(np.full_like(array, draw.choice((np.nan, np.inf, 3e38, -3e38))))
        case 7:
            data = to_npy(np.zeros(draw.choice((0, 1, 10**6)), draw.choice((np.float32, np.float64, np.int8))))
    return Array(dtype="float32", shape=array.shape, stype=stype, data=data)


def _npy(header: str) -> bytes:
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header) + 1) + header.encode() + b"\n" + bytes(8)


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning", "ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("count", COUNTS)
def test_sites_send_hostile_replies_and_the_server_averages_the_others(make_run, count):
    """Ten rounds' worth of hostile replies beside a sound one, in each round."""
    draw, rounds = random.Random(count), count // 2
    build(make_run()).aggregate_train(5, [message(11, reply(11, 0.5))])  # compiles the mean, once per process
    for _ in range(rounds):
        strategy = build(make_run())
        sent = [message(11, reply(11, 0.5))]
        for node in (12, 13):
            records = reply(node, 1.0).to_records()
            arrays = {name: Array(array) for name, array in records.arrays.items()}
            if draw.random() < 0.6:
                name = draw.choice(list(arrays))
                arrays[name] = spoilt_npy(draw, records.arrays[name])
            if draw.random() < 0.1:
                arrays |= {f"g{number}" + "x" * 200: Array(np.zeros(1, np.float32)) for number in range(30)}
            metrics = spoilt_words(draw, dict(records.metrics), NUMBERS)
            config = spoilt_words(draw, dict(records.config), WORDS)
            sent.append(answer_of(node, config, metrics, ArrayRecord(arrays)))
        with within_bounds(len(sent)):
            strategy.aggregate_train(5, sent)
        outcome = strategy.outcome
        assert ROSTER[11].site in outcome.accepted
        assert set(outcome.accepted) | set(outcome.rejected) == {handshake.site for handshake in ROSTER.values()}
        for line in outcome.rejected.values():
            assert len(line) <= 300
            assert line.isprintable()
        assert len(json_text({site: dict(each.saliency) for site, each in outcome.accepted.items()})) < 1000


class _Errors:
    """A grid on which every node answers with an error."""

    def __init__(self, reason: Callable[[], str]) -> None:
        self._reason, self._asked = reason, {}

    def push_messages(self, messages):
        for each in messages:
            each.metadata.__dict__["_message_id"] = f"to-{each.metadata.dst_node_id}"
            self._asked[each.metadata.message_id] = each
        return list(self._asked)[-1:]

    def pull_messages(self, ids):
        return [Message(Error(1000, self._reason()), reply_to=self._asked[ids[0]])]


@pytest.mark.parametrize("count", COUNTS)
def test_sites_send_hostile_errors_and_the_server_keeps_short_lines(count):
    answer_of(1, {})
    draw = random.Random(count)
    parts = ("site a: ", "x", " ", "\n", "\x1b[2J", "\u2028", "\u4e2d", "a " * 999)
    grid = _Errors(lambda: draw.choice(parts) + draw.choice(parts) * draw.choice((0, 1, 99, 9999)))
    exchange = Exchange(grid, [Message(RecordDict(), node, "query") for node in range(1, count + 1)], 60.0)
    with within_bounds("errors"):
        assert not list(exchange)
    assert len(exchange.failed) == count
    assert all(len(reason) <= 300 and (reason.isprintable()) for reason in exchange.failed.values())
