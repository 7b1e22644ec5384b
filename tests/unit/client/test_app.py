"""The ClientApp always answers, says nothing that it should not, and is light."""

import subprocess
import sys
from pathlib import Path

import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy import zeros

from client.app import SITE_ERROR, app
from panfm.config import dump_toml
from panfm.sharing.messages import Handshake, Invitation, Records

STREAM = "{ spacing-mm = [8.0, 8.0, 8.0], shape = [8, 8, 8], patch = [4, 4, 8] }"


OWN = "this site's own description does not hold"


def ask(kind: str, config: dict, context: Context, arrays: dict | None = None) -> Message:
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    content = RecordDict({"config": ConfigRecord(config), "arrays": ArrayRecord(arrays or {})})
    message = Message(content, 7, kind)
    message.metadata.__dict__["_message_id"] = "question"
    reply = app(message, context)
    assert isinstance(reply, Message)
    assert reply.metadata.reply_to_message_id == "question"
    return reply


def at(site: Path) -> Context:
    """A simulated site, the only one of its folder."""
    return Context(1, 7, {"partition-id": 0, "num-partitions": 1}, RecordDict(), {"sites": str(site.parent)})


@pytest.fixture
def site(tmp_path, write_site):
    return write_site(tmp_path / "patients-of-ward-3", "alpha", ("brain", "heart"))


@pytest.fixture
def invitation() -> dict:
    from panfm.config import parse_run

    run = parse_run(f'name = "small"\n[streams]\nbrain-mr = {STREAM}\nheart-mr = {STREAM}\n')
    return dict(Invitation(dump_toml(run)).to_records().config)


def test_it_shakes_hands(site, invitation):
    reply = ask("query", invitation, at(site))
    config = dict(next(iter(reply.content.config_records.values())))
    assert Handshake.from_records(Records(config=config)).streams == {"brain-mr": 5, "heart-mr": 5}


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr("client.relay.START_S", 0.1)


def test_node_config_wins_over_the_servers_run_config(site, invitation, tmp_path, impatient):
    node_config = {"site-socket": str(tmp_path / "worker.sock"), "partition-id": 0}
    context = Context(1, 7, node_config, RecordDict(), {"sites": str(site.parent), "run-dir": str(tmp_path / "x")})
    assert ask("query", invitation, context).error.reason.startswith("TimeoutError: the site's worker cannot be asked")
    assert not (tmp_path / "x").exists()


def test_it_imports_no_torch():
    """Flower starts a new process for every message."""
    heavy = "{'torch', 'monai', 'nibabel', 'sklearn', 'panfm.config', 'panfm.site', 'panfm.data'}"
    code = f"import sys, client.app; sys.exit(str({heavy} & set(sys.modules)) if {heavy} & set(sys.modules) else 0)"
    root = Path(__file__).resolve().parents[3]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_without_socket_and_simulation_it_says_so(invitation):
    reply = ask("query", invitation, Context(1, 7, {}, RecordDict(), {}))
    assert reply.error.reason.startswith("ConfigError: the site's worker cannot be asked")


@pytest.mark.parametrize(
    ("kind", "config", "reason"),
    [
        ("query", {"run": "name = "}, "site alpha: ProtocolError: run description: not valid TOML:"),
        ("query", {}, "site alpha: ProtocolError: message: run is NoneType, expected str"),
        ("train", {"run-id": "r", "round": 1}, "site alpha: ProtocolError: message: run is NoneType, expected str"),
        ("train", {"run-id": "../r", "round": 1, "run": ""}, "site alpha: ProtocolError"),
    ],
)
def test_errors_are_answered(site, kind, config, reason):
    reply = ask(kind, config, at(site))
    assert reply.error.code == SITE_ERROR
    assert reply.error.reason.startswith(reason)
    assert "ward" not in reply.error.reason


def test_an_absent_site_is_answered(tmp_path):
    assert ask("train", {}, at(tmp_path / "absent" / "x")).error.reason.startswith(f"ConfigError: {OWN}")


def test_the_whole_story_stays_at_the_site(site, invitation, monkeypatch):
    (site / "manifest.csv").unlink()
    reply = ask("query", invitation, at(site))
    log = site / ".panfm" / "state" / "site.log"
    assert "manifest.csv" in log.read_text()
    assert "Traceback" in log.read_text()
    monkeypatch.setattr(Path, "mkdir", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    assert ask("query", invitation, at(site)).error.reason == reply.error.reason


def test_an_internal_error_is_answered_without_its_text(site, invitation, monkeypatch):
    def fail(*_):
        raise SystemExit("/srv/patients-of-ward-3/scan.nii.gz")

    monkeypatch.setattr("panfm.site.site.Site.handshake", fail)
    reply = ask("query", invitation, at(site))
    assert reply.error.reason == "site alpha: internal error (SystemExit)"


folder_names = st.text(st.sampled_from("ab .,'\"`;()-\u2019\u00e9"), min_size=1, max_size=20).filter(
    lambda n: n.strip(". ")
)


@settings(max_examples=40)
@given(
    folder_names, st.sampled_from(["patient-john-doe-1961 = 1", "name = 'St Mary', ", 'name = ""', "manifest = 'x'"])
)
def test_nothing_of_the_sites_own_files_is_answered(tmp_path_factory, invitation, name, text):
    """Folders with spaces and apostrophes; keys that are patients."""
    folder = tmp_path_factory.mktemp("sites") / f"St Mary's Oncology{name}patient John's"
    folder.mkdir()
    (folder / "site.toml").write_text(text)
    reply = ask("query", invitation, at(folder))
    assert reply.error.reason == f"ConfigError: {OWN}; its log tells more"
    (folder / "site.toml").write_text("name = 'alpha'\nmanifest = \"patients' table.csv\"")
    reply = ask("query", invitation, at(folder))
    assert (
        reply.error.reason == "site alpha: DataError: this site's data or private state is faulty; its log tells more"
    )


scalars = st.one_of(
    st.text(max_size=20), st.integers(-(2**40), 2**40), st.floats(), st.booleans(), st.binary(max_size=9)
)
keys = st.one_of(st.sampled_from(["run", "run-id", "round", "profile-names", "profile-values"]), st.text(min_size=1))


@settings(max_examples=40)
@given(st.sampled_from(["query", "train"]), st.dictionaries(keys, st.one_of(scalars, st.lists(st.integers(0, 9)))))
def test_whatever_is_asked_is_answered(site, kind, config):
    reply = ask(kind, config, at(site), {"backbone": Array(zeros(3))})
    assert reply.has_error()
    assert "ward" not in (reply.error.reason or "")
