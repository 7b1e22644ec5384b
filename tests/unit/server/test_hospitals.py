"""The record of hospitals against a Flower that answers as the real one does, also when it is killed in between."""

import base64
import hashlib
import json
import subprocess
import tomllib
from pathlib import Path

import pytest

from panfm.errors import ConfigError, RunError
from server import hospitals
from server.hospitals import Hospitals, fingerprint_of, plain_fingerprint, spelled

BLOB = b"\x00\x00\x00\x13ecdsa-sha2-nistp384 of a test"


class FakeFlower:
    """Nodes of a SuperLink; a list of commands after which the caller is killed."""

    def __init__(self) -> None:
        self.keys: dict[str, str] = {}
        self.statuses: dict[str, str] = {}
        self.kill_after: set[str] = set()

    def __call__(self, words: list[str], _environment: object) -> dict[str, object]:
        _, verb, *more = words
        answer = getattr(self, verb)(*more)
        if verb in self.kill_after:
            raise KeyboardInterrupt
        return answer

    def list(self, *_: str) -> dict[str, object]:
        return {"nodes": [{"node-id": node, "status": status} for node, status in self.statuses.items()]}

    def register(self, key: str, *_: str) -> dict[str, object]:
        text = Path(key).read_text()
        if text in self.keys.values():
            raise RunError("flwr supernode: [code: 23] Public key already in use")
        node = str(100 + len(self.keys))
        self.keys[node], self.statuses[node] = text, "registered"
        return {"node-id": node}

    def unregister(self, node: str, *_: str) -> dict[str, object]:
        if self.statuses.get(node) != "registered":
            raise RunError("flwr supernode: no such node")
        self.statuses[node] = "unregistered"
        return {}


@pytest.fixture
def flower(monkeypatch):
    flower = FakeFlower()
    monkeypatch.setattr(hospitals, "flwr", flower)
    return flower


@pytest.fixture
def record(tmp_path, flower):
    (tmp_path / "config.toml").write_text('[superlink.deployment]\naddress = "127.0.0.1:8000"\n')
    return Hospitals({"FLWR_HOME": str(tmp_path)}, "deployment")


@pytest.fixture
def key(tmp_path):
    def make(name: str = "key") -> Path:
        path = tmp_path / f"{name}.pub"
        path.write_text(f"ecdsa-sha2-nistp384 {base64.b64encode(BLOB + name.encode()).decode()} {name}\n")
        return path

    return make


def told(key: Path) -> str:
    return spelled(fingerprint_of(key))


def test_the_fingerprint_is_that_of_ssh_keygen(tmp_path):
    subprocess.run(["ssh-keygen", "-q", "-t", "ecdsa", "-b", "384", "-N", "", "-f", tmp_path / "k"], check=True)
    shown = subprocess.run(["ssh-keygen", "-l", "-f", tmp_path / "k.pub"], capture_output=True, text=True, check=True)
    assert plain_fingerprint(shown.stdout.split()[1]) == fingerprint_of(tmp_path / "k.pub")


def test_a_fingerprint_may_be_typed_in_several_ways():
    digest = hashlib.sha256(BLOB).hexdigest()
    for text in (digest, spelled(digest), spelled(digest).upper(), f"  {spelled(digest)}\n"):
        assert plain_fingerprint(text) == digest
    for text in ("", "0000", digest[:-1], digest + "0", "SHA256:", "SHA256:!!", "g" * 64, "\x00" * 64):
        with pytest.raises(ConfigError, match="--fingerprint: found"):
            plain_fingerprint(text)


def test_a_hospital_joins_and_leaves_and_the_record_keeps_both(record, flower, key):
    entry = record.register("north", key(), told(key()))
    assert (entry.node_id, flower.statuses) == ("100", {"100": "registered"})
    [ended] = record.revoke("north")
    assert (ended.node_id, bool(ended.revoked), flower.statuses) == ("100", True, {"100": "unregistered"})
    assert record.entries() == [ended]
    assert tomllib.loads(record.path.read_text())["registration"][0]["hospital"] == "north"
    with pytest.raises(ConfigError, match="north: no key of it is let in; expected one of: nobody"):
        record.revoke("north")
    with pytest.raises(ConfigError, match="expected a new key"):
        record.register("north", key(), told(key()))
    assert record.register("north", key("second"), told(key("second"))).node_id == "101"


def test_nothing_is_asked_of_flower_for_a_wrong_fingerprint_name_or_key(record, flower, key, tmp_path):
    with pytest.raises(ConfigError, match="another than was told"):
        record.register("north", key(), "0000 " * 16)
    for name in ("", "North", "../north", "a b", "-x", "x" * 65, 'a"\nb', "ü"):
        with pytest.raises(ConfigError, match="hospital: found") as error:
            record.register(name, key(), told(key()))
        assert "\n" not in str(error.value)
    (tmp_path / "rsa.pub").write_text("ssh-rsa AAAA x\n")
    (tmp_path / "empty.pub").write_text("")
    for path in (tmp_path / "rsa.pub", tmp_path / "empty.pub", tmp_path / "none.pub", tmp_path):
        with pytest.raises(ConfigError, match=r"expected (an|one line of an) ECDSA public key"):
            record.register("north", path, "0000 " * 16)
    assert (flower.keys, record.entries()) == ({}, [])


def test_a_second_key_needs_to_be_asked_for(record, flower, key):
    record.register("north", key(), told(key()))
    with pytest.raises(ConfigError, match="registered already, as node 100"):
        record.register("north", key(), told(key()))
    with pytest.raises(ConfigError, match="was let in as north before"):
        record.register("south", key(), told(key()))
    with pytest.raises(ConfigError, match="--renew"):
        record.register("north", key("new"), told(key("new")))
    assert record.register("north", key("new"), told(key("new")), renew=True).node_id == "101"
    assert flower.statuses == {"100": "unregistered", "101": "registered"}


def test_a_command_killed_before_its_answer_was_written_is_mended_by_giving_it_again(record, flower, key):
    record.register("south", key("south"), told(key("south")))
    flower.kill_after = {"register"}
    with pytest.raises(KeyboardInterrupt):
        record.register("north", key(), told(key()))
    flower.kill_after = set()
    assert record.register("north", key(), told(key())).node_id == "101"
    flower.kill_after = {"unregister"}
    with pytest.raises(KeyboardInterrupt):
        record.revoke("north")
    flower.kill_after = set()
    [ended] = record.revoke("north")
    assert bool(ended.revoked)
    assert flower.statuses == {"100": "registered", "101": "unregistered"}


def test_a_node_that_may_be_somebody_elses_is_not_taken(record, flower, key):
    flower.kill_after = {"register"}
    with pytest.raises(KeyboardInterrupt):
        record.register("north", key(), told(key()))
    flower.kill_after = set()
    flower.register(str(key("by-hand")))
    with pytest.raises(RunError, match="north: Flower knows this key, and of its nodes the record lacks 100, 101"):
        record.register("north", key(), told(key()))
    with pytest.raises(RunError, match="cut short"):
        record.revoke("north")


def test_a_damaged_record_is_one_line(record, key):
    for text in ("[", "registration = 3", '[[registration]]\nhospital = "x"\n', json.dumps({})):
        record.path.write_text(text)
        with pytest.raises(ConfigError, match="expected a record of registrations") as error:
            record.register("north", key(), told(key()))
        assert "\n" not in str(error.value)
    with pytest.raises(ConfigError, match="FLWR_HOME: found no folder"):
        Hospitals({"FLWR_HOME": str(record.home / "none")}, "deployment").revoke("north")
