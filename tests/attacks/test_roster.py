"""Who is not in the coordinator's table, or says it has more subjects than stand there, takes no part."""

import re
from dataclasses import replace

import pytest
from flwr.app import Context, RecordDict
from typer.testing import CliRunner

from client.app import app as client_app
from client.records import pack
from panfm.config import dump_toml
from panfm.errors import DataError, ProtocolError, RunError
from panfm.sharing.messages import Handshake
from server import coordinator
from server.app import app as server_app
from server.coordinator import app
from server.expected_sites import ExpectedSites
from server.run_folder import RunFolder
from simulations.engines.job import Job
from simulations.engines.local import LocalGrid
from strategies.round_messages import unpack

TABLE = "site,subjects,brain-mr\nalpha,100,60\nbeta,10,\n"


def told(site: str, subjects: int, **streams: int) -> Handshake:
    return Handshake(site, subjects, {name.replace("_", "-"): count for name, count in streams.items()}, {}, "", {})


def of(tmp_path, text: str) -> ExpectedSites:
    (tmp_path / "table.csv").write_text(text)
    return ExpectedSites.read(tmp_path / "table.csv")


@pytest.mark.parametrize(
    ("handshake", "why"),
    [
        (told("mallory", 1), "is not in the coordinator's table"),
        (told("alpha", 1_000_000), "1000000 subjects, expected about 100, at most 110"),
        (told("alpha", 111), "111 subjects, expected about 100, at most 110"),
        (told("alpha", 100, brain_mr=67), "67 subjects with brain-mr, expected about 60, at most 66"),
        (told("beta", 13), "13 subjects, expected about 10, at most 12"),
        (told("beta", 10, brain_mr=1), "holds brain-mr, not expected of it"),
    ],
)
def test_a_handshake_that_the_table_does_not_expect_is_refused(tmp_path, handshake, why):
    with pytest.raises(ProtocolError, match=re.escape(why)):
        of(tmp_path, TABLE).check(handshake)


def test_a_tenth_more_or_two_or_fewer_are_let_pass(tmp_path):
    table = of(tmp_path, TABLE)
    for handshake in (told("alpha", 110, brain_mr=66, heart_mr=999), told("beta", 12), told("alpha", 0, brain_mr=0)):
        table.check(handshake)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "no column site"),
        ("site,subjects\n", "no sites"),
        ("site,subjects\na,10\na,11\n", "line 3: site 'a', expected a name that stands once"),
        ("site,subjects\na,-1\n", "line 2: subjects is '-1', expected a whole number from 1"),
        ("site,subjects\na,1e6\n", "line 2: subjects is '1e6'"),
        ("site,subjects\na,9999999999\n", "line 2: subjects is"),
        ("site,subjects\na,10,3\n", "3 cells on line 2"),
        ("site,subjects,x,x\na,1,2,3\n", "column 'x' twice"),
    ],
)
def test_a_faulty_table_is_refused_with_one_line(tmp_path, text, why):
    with pytest.raises(DataError, match=re.escape(why)) as caught:
        of(tmp_path, text)
    assert str(caught.value).startswith(f"{tmp_path / 'table.csv'}: ")
    assert "\n" not in str(caught.value)


class Boasting(LocalGrid):
    """The last site says it has a million subjects."""

    def _reply(self, message):
        reply = super()._reply(message)
        if message.metadata.message_type == "query" and message.metadata.dst_node_id == max(self.get_node_ids()):
            handshake = Handshake.from_records(unpack(reply.content))
            streams = dict.fromkeys(handshake.streams, 1_000_000)
            reply.content = pack(replace(handshake, subjects=1_000_000, streams=streams).to_records())
        return reply


def test_a_boasting_site_ends_a_run_that_insists_on_it_and_the_table_never_leaves(tmp_path, make_run, write_site):
    for name in ("alpha", "beta"):
        write_site(tmp_path / "sites" / name, name, ("brain",))
    folder = RunFolder.create(tmp_path / "run", make_run())
    folder.expect(of(tmp_path, "site,subjects\nalpha,50\nbeta,50\n"))
    job = Job(tmp_path / "sites", folder.path)
    grid, sent = Boasting(client_app, 2, job.run_config()), []
    push = grid.push_messages
    grid.push_messages = lambda messages: push([sent.append(repr(message.content)) or message for message in messages])
    with pytest.raises(RunError, match="site beta: 1000000 subjects, expected about 50, at most 55"):
        server_app(grid, Context(1, 1, {}, RecordDict(), dict(job.run_config())))
    assert sent
    assert not any("expected" in text for text in sent)


def test_the_coordinator_makes_shows_and_checks_a_table(tmp_path, monkeypatch, make_run):
    run = tmp_path / "run"
    run.mkdir()
    (run / "sites.json").write_text(
        '{"sites": {"beta": {"subjects": 10, "streams": {}}, "alpha": {"subjects": 100, "streams": {"brain-mr": 60}}}}'
    )
    command, file = CliRunner(), tmp_path / "table.csv"
    assert command.invoke(app, ["roster", "make", str(run), "--out", str(file)]).exit_code == 0
    assert file.read_text() == TABLE
    assert command.invoke(app, ["roster", "show", str(file)]).output == TABLE
    assert "all 2 sites" in command.invoke(app, ["roster", "check", str(file), str(run)]).output
    file.write_text("site,subjects\nbeta,5\n")
    refused = command.invoke(app, ["roster", "check", str(file), str(run)])
    assert "site alpha: is not in" in str(refused.exception)
    assert "site beta: 10 subjects, expected about 5, at most 7" in str(refused.exception)
    assert "exists, expected a new file" in str(
        command.invoke(app, ["roster", "make", str(run), "--out", str(file)]).exception
    )

    (tmp_path / "experiment.toml").write_text(dump_toml(make_run()))
    monkeypatch.setattr(coordinator, "_submit", lambda *_: None)
    words = [str(tmp_path / "experiment.toml"), "--connection", "lab", "--detach", "--out"]
    begun = command.invoke(app, ["start", *words, str(tmp_path / "begun"), "--roster", str(file)])
    assert begun.exit_code == 0, begun.exception
    assert RunFolder(tmp_path / "begun", make_run()).expected_sites() == ExpectedSites.read(file)
    file.write_text("nonsense")
    failed = command.invoke(app, ["start", *words, str(tmp_path / "other"), "--roster", str(file)])
    assert "no column site, subjects" in str(failed.exception)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("table", "complaint"),
    [
        ("site,subjects,brainmr\nalpha,100,60\n", "line 1: column stream 'brainmr': expected <organ>-<modality>"),
        ("site,subjects\nHeart Centre,100\n", "line 2: site 'Heart Centre', expected lower-case letters"),
        ("site,subjects\nalpha,100\nalpha,100\n", "line 3: site 'alpha', expected a name"),
        ("site,subjects,brain-mr\nalpha,15,33\n", "line 2: brain-mr is 33, expected at most the 15 subjects"),
    ],
)
def test_a_table_that_could_never_work_is_refused(tmp_path, table, complaint):
    path = tmp_path / "sites.csv"
    path.write_text(table)
    with pytest.raises(DataError) as caught:
        ExpectedSites.read(path)
    assert str(caught.value).startswith(f"{path}: {complaint}")
