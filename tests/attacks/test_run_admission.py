"""A server that asks more of a site than one answer per round, one start, and one run at a time."""

import json
import time
from dataclasses import replace

import numpy as np
import pytest
import safetensors.torch
from typer.testing import CliRunner

from panfm.cli import main
from panfm.config import dump_toml, load_run, parse_run
from panfm.config.start import StartConfig
from panfm.errors import DataError, LimitError, PendingApprovalError, ProtocolError
from panfm.files import read_checked, write_checked
from panfm.models import build_model
from panfm.sharing.coding import digests, take_step
from panfm.sharing.groups import GroupManifest, parameter_hashes
from panfm.sharing.messages import Invitation, RoundTask
from panfm.site import Site
from panfm.site.experiment_requests import read_requests
from server.rounds import initial_state
from server.run_folder import RunFolder
from strategies.round_messages import code_step
from tests.cases import approve, quick

RUN = """
name = "small"
seed = 3
[streams]
brain-mr = { spacing-mm = [8.0, 8.0, 8.0], shape = [8, 8, 8], patch = [4, 4, 8] }
heart-mr = { spacing-mm = [8.0, 8.0, 8.0], shape = [8, 8, 8], patch = [4, 4, 8] }
[train]
rounds = 7
local-steps = 1
batch-size = 3
"""
DEX = '[model]\nbackbone = "director-experts"\nexperts.count = 4\n'
PRIVATE = """
[objective]
standardise = false
[masking]
policy = "random"
[patient-dp]
epsilon = 99.0
delta = 1e-3
public-subjects = 40
noise-multiplier = 1.5
sample-rate = 0.5
"""


@pytest.fixture
def folder(tmp_path, write_site):
    return write_site(tmp_path / "alpha", "alpha", ("brain", "heart"))


def task(number=1, *, run_id="run-1", extra="", moved=0.0) -> RoundTask:
    """A question; `moved` is added to every global parameter."""
    run = parse_run(RUN + extra)
    model = build_model(run)
    tensors = {name: tensor.numpy() + np.float32(moved) for name, tensor in model.state_dict().items()}
    groups = GroupManifest.of(model.parameter_groups(), tensors).pack_all(tensors)
    return RoundTask(run_id, number, dump_toml(run), groups)


def same(one, other) -> bool:
    return all(one.updates[group].tobytes() == other.updates[group].tobytes() for group in one.updates)


@pytest.mark.parametrize("extra", ["", PRIVATE])
def test_server_asks_a_round_five_times_with_other_parameters_and_gets_one_answer(folder, extra):
    """Whether the site's process is the same or a new one."""
    site = Site(folder)
    site.train_round(task(extra=extra))
    site.train_round(task(2, extra=extra))
    for number in range(1, 5):
        with pytest.raises(ProtocolError, match=r"^round 2: asked before with other parameters .*start a new run"):
            Site(folder).train_round(task(2, extra=extra, moved=0.01 * number))
    assert Site(folder).train_round(task(2, extra=extra)).state_round == 1


def test_a_round_that_failed_at_the_site_is_asked_for_good(folder, monkeypatch):
    site = Site(folder)
    site.train_round(task())
    monkeypatch.setattr("panfm.site.session.Session._train", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        site.train_round(task(2))
    monkeypatch.undo()
    with pytest.raises(ProtocolError, match="round 2: asked before"):
        site.train_round(task(2, moved=0.01))
    assert site.train_round(task(2)).state_round == 1


@pytest.mark.parametrize(
    "change",
    [
        {"profile": {"brain-mr": 1.5, "heart-mr": 0.5}},
        {"teacher": task(moved=0.25).groups},
        {"run_toml": task(extra="learning-rate = 0.01\n").run_toml},
    ],
)
def test_server_asks_a_round_again_with_another_profile_teacher_or_description_and_is_refused(folder, change):
    site = Site(folder)
    site.train_round(task())
    site.train_round(task(2))
    with pytest.raises((ProtocolError, DataError)):
        site.train_round(replace(task(2), **change))


def test_a_resumed_server_and_one_that_sends_the_step_in_place_of_the_parameters_are_answered_alike(folder):
    extra = '[sharing]\ncoding = "int8"\n'
    first = task(extra=extra)
    model = build_model(parse_run(first.run_toml))
    manifest = GroupManifest.of(model.parameter_groups(), model.state_dict())
    step = {}
    for group, flat in first.groups.items():
        step |= code_step("int8", manifest, group, np.full_like(flat, 0.01), {})[0]
    reached = take_step("int8", manifest, first.groups, step)
    site = Site(folder)
    site.train_round(first)
    found = site.train_round(replace(first, round_number=2, groups=step, digests=digests(reached)))
    assert same(Site(folder).train_round(replace(first, round_number=2, groups=reached)), found)


def test_server_rewinds_the_private_state_and_is_answered_with_what_it_has_already(folder):
    """Back by as many rounds as states are kept, and on again: the same answers. Further back, or a round that was
    left out: none."""
    site = Site(folder)
    answers = {number: site.train_round(task(number)) for number in (1, 2, 4, 5, 6)}
    assert all(same(site.train_round(task(number)), answers[number]) for number in (5, 6))
    with pytest.raises(ProtocolError, match=r"^round 3: asked after round 6; .*start a new run"):
        site.train_round(task(3))
    with pytest.raises(ProtocolError, match=r"^round 2: asked before with other parameters or from another private"):
        site.train_round(task(2))
    assert site.train_round(task(7)).state_round == 6


def test_a_note_that_was_changed_stops_the_site(folder):
    Site(folder).train_round(task())
    path = folder / ".panfm" / "state" / "runs" / "run-1" / "asked.json"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"asked\.json: corrupted"):
        Site(folder).train_round(task(2))


def test_server_chooses_where_round_1_starts_and_is_refused(folder):
    site = Site(folder)
    for group in task().groups:
        chosen = dict(task().groups)
        chosen[group] = chosen[group].copy()
        chosen[group][-1] = np.nextafter(chosen[group][-1], np.float32(np.inf))
        with pytest.raises(ProtocolError, match=f"^round 1: {group} is not what the run's seed gives"):
            site.train_round(replace(task(), groups=chosen))
    assert site.train_round(task()).updates


def test_server_chooses_the_teacher_of_round_1_and_is_refused(folder):
    asked = task(extra='teacher-start = "server-ema"\n')
    with pytest.raises(ProtocolError, match=r"^round 1: backbone is not what the run's seed gives"):
        Site(folder).train_round(replace(asked, teacher=task(moved=0.01).groups))
    assert Site(folder).train_round(replace(asked, teacher=asked.groups)).updates


@pytest.mark.parametrize("extra", quick(["", DEX, DEX + '[sharing]\nexperts = "pooled"\n'], 1))
def test_server_names_one_start_and_sends_another_and_is_refused(folder, tmp_path, extra):
    """A start from a dense model; its hashes, group by group, are in the description that sites are told."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "run.toml").write_text(RUN)
    state = {name: value + 1.0 for name, value in build_model(parse_run(RUN)).state_dict().items()}
    (tmp_path / "model" / "model.safetensors").write_bytes(safetensors.torch.save(state))
    (tmp_path / "run.toml").write_text(f'{RUN}{extra}\n[start]\nmodel = "{tmp_path}/model"\n')
    run_folder = RunFolder.create(tmp_path / "run", load_run(tmp_path / "run.toml"))
    told = run_folder.shared_run
    first, _ = initial_state(told, run_folder.start())
    assert told == RunFolder.resume(tmp_path / "run").shared_run
    assert set(told.start.parameters) == set(first.groups)
    asked = RoundTask("run-1", 1, dump_toml(told), first.groups)
    chosen = {group: flat + np.float32(1e-3) for group, flat in first.groups.items()}
    with pytest.raises(ProtocolError, match=r"^round 1: backbone is not what start\.parameters names"):
        Site(folder).train_round(replace(asked, groups=chosen))
    assert Site(folder).train_round(asked).updates
    silent = told.model_copy(update={"start": told.start.model_copy(update={"parameters": None})})
    with pytest.raises(ProtocolError, match=r"^start\.parameters: missing"):
        Site(folder, tmp_path / "other").train_round(replace(asked, run_toml=dump_toml(silent)))


def chosen_start(moved: float, extra: str = "") -> RoundTask:
    """Round 1 of a run whose description names the very parameters that the server has written."""
    run, groups = parse_run(RUN + extra), task(moved=moved).groups
    run = run.model_copy(update={"start": StartConfig(parameters=parameter_hashes(groups))})
    return RoundTask(f"run-{round(10 * moved)}", 1, dump_toml(run), groups)


def test_server_writes_the_start_of_every_run_itself_and_is_refused(folder):
    """Round 1 of thirty runs was a choice of the server's, and answered. Not one of them is approved."""
    site = Site(folder, needs_approval=True)
    for number in range(30):
        with pytest.raises(PendingApprovalError, match=r"^experiment [0-9a-f]{64} waits for this site's approval"):
            site.train_round(chosen_start(0.1 * number))
    with pytest.raises(PendingApprovalError):
        site.handshake(Invitation(chosen_start(0.1).run_toml))
    assert not (site.state_dir / "runs").exists()
    assert len(read_requests(site.state_dir)) == 20


@pytest.mark.parametrize("extra", ["", PRIVATE])
def test_a_start_that_the_operator_has_approved_is_answered_and_no_other(folder, extra):
    asked = chosen_start(0.1, extra)
    approve(folder, parse_run(asked.run_toml))
    site = Site(folder, needs_approval=True)
    with pytest.raises(PendingApprovalError, match=r"^experiment "):
        site.train_round(chosen_start(0.2, extra))
    assert site.train_round(asked).updates


def test_an_approved_start_under_other_parameters_is_refused(folder):
    """An approval covers the hashes of the starting parameters; a description that names others is not approved."""
    approve(folder, parse_run(chosen_start(0.1).run_toml))
    site, other = Site(folder, needs_approval=True), chosen_start(0.2)
    run = parse_run(other.run_toml)
    lie = run.model_copy(update={"start": run.start.model_copy(update={"sha256": "0" * 64})})
    with pytest.raises(PendingApprovalError):
        site.train_round(replace(other, run_toml=dump_toml(lie)))
    with pytest.raises(ProtocolError, match=r"^round 1: backbone is not what start\.parameters names"):
        site.train_round(replace(chosen_start(0.1), groups=other.groups))


def test_weights_of_other_parameters_than_the_description_names_start_no_run(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "run.toml").write_text(RUN)
    content = safetensors.torch.save(build_model(parse_run(RUN)).state_dict())
    (tmp_path / "model" / "model.safetensors").write_bytes(content)
    table = f'\n[start]\nmodel = "{tmp_path}/model"\n[start.parameters]\nbackbone = "{"0" * 64}"\n'
    (tmp_path / "run.toml").write_text(RUN + table)
    with pytest.raises(DataError, match=r"^start\.parameters: the weights have another backbone"):
        RunFolder.create(tmp_path / "run", load_run(tmp_path / "run.toml"))


def test_server_interleaves_two_runs_and_the_second_is_refused_until_the_first_is_over(folder):
    site = Site(folder)
    site.train_round(task())
    with pytest.raises(LimitError, match=r"^run run-1 is not finished, last asked 20.*limits\.runs-at-once is 1"):
        site.train_round(task(run_id="run-2"))
    assert site.train_round(task(2)).state_round == 1
    assert site.train_round(task(7)).state_round == 2  # the last one
    assert site.train_round(task(run_id="run-2")).updates
    with pytest.raises(LimitError, match=r"^run run-2 is not finished"):
        Site(folder).train_round(task(run_id="run-3"))


def test_an_operator_ends_a_run_for_good(folder):
    def end(run_id):
        return CliRunner().invoke(main, ["site", "end", str(folder), run_id])

    site = Site(folder)
    site.train_round(task())
    assert end("run-2").exit_code == 1
    assert end("../runs").exit_code == 1
    assert (
        "run run-1: not finished, asked for round 1 of 7"
        in CliRunner().invoke(main, ["site", "status", str(folder)]).output.splitlines()
    )
    assert end("run-1").output == "run run-1: ended at this site\n"
    with pytest.raises(LimitError, match=r"^run run-1: the operator of this site has ended it"):
        site.train_round(task(2))
    assert site.train_round(task(run_id="run-2")).updates


def test_a_run_that_asks_for_nothing_for_a_day_gives_way(folder):
    from panfm.site.state import active_runs

    site = Site(folder)
    site.train_round(task())
    path = folder / ".panfm" / "state" / "runs" / "run-1" / "asked.json"
    note = json.loads(read_checked(path))
    assert note["newest"] == pytest.approx(time.time(), abs=600.0)
    for hours, active in ((23.9, ["run-1"]), (24.1, [])):
        write_checked(path, json.dumps(note | {"newest": time.time() - 3600.0 * hours}).encode())
        assert list(active_runs(site.state_dir, site.config.limits)) == active
    assert site.train_round(task(run_id="run-2")).updates
    with pytest.raises(LimitError, match=r"^run run-2 is not finished"):
        site.train_round(task(2))


def test_a_site_that_allows_two_runs_refuses_the_third(tmp_path, write_site):
    site = Site(write_site(tmp_path / "beta", "beta", ("brain", "heart"), extra="[limits]\nruns-at-once = 2\n"))
    for run_id in ("run-1", "run-2"):
        assert site.train_round(task(run_id=run_id)).updates
    with pytest.raises(LimitError, match=r"^run run-2 is not finished"):
        site.train_round(task(run_id="run-3"))
