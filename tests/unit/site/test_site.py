"""One site's round, on real files."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from panfm.config import dump_toml, experiment_hash, parse_run
from panfm.errors import DataError, ProtocolError
from panfm.models import build_model
from panfm.sharing.coding import decode, digests, take_step
from panfm.sharing.frames import Frame
from panfm.sharing.groups import GroupManifest
from panfm.sharing.messages import Invitation, RoundTask
from panfm.site import Site, session
from panfm.site.audit_log import AuditLog
from panfm.site.state import StateStore
from panfm.training.trainer import Trainer, Validation
from strategies.round_messages import code_step

RUN = """
name = "small"
seed = 3
[streams]
brain-mr = { spacing-mm = [8.0, 8.0, 8.0], shape = [8, 8, 8], patch = [4, 4, 8] }
heart-mr = { spacing-mm = [8.0, 8.0, 8.0], shape = [8, 8, 8], patch = [4, 4, 8] }
liver-mr = { spacing-mm = [8.0, 8.0, 8.0], shape = [8, 8, 8], patch = [4, 4, 8] }
[train]
rounds = 6
local-steps = 2
validate-every = 1
batch-size = 3
"""


@pytest.fixture
def folder(tmp_path, write_site):
    return write_site(tmp_path / "alpha", "alpha", ("brain", "heart"))


def task(round_number=1, *, run_id="run-1", extra="") -> RoundTask:
    run = parse_run(RUN + extra)
    model = build_model(run)
    tensors = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    manifest = GroupManifest.of(model.parameter_groups(), tensors)
    groups = manifest.pack_all(tensors)
    if run.sharing.rule == "grouped":
        del groups["stream:liver-mr"]
    if run.sharing.head == "private":
        del groups["head"]
    return RoundTask(run_id, round_number, dump_toml(run), groups)


def same(one, other) -> bool:
    """Replies equal to the bit."""
    arrays = one.updates.keys() == other.updates.keys() and all(
        one.updates[group].tobytes() == other.updates[group].tobytes() for group in one.updates
    )
    return arrays and replace(one, updates={}) == replace(other, updates={})


def test_handshake(folder):
    shaken = Site(folder).handshake(Invitation(task().run_toml))
    assert (shaken.site, shaken.subjects, shaken.streams) == ("alpha", 5, {"brain-mr": 5, "heart-mr": 5})
    assert sorted(shaken.group_hashes) == ["backbone", "head", "stream:brain-mr", "stream:heart-mr"]
    assert shaken.versions["torch"] == torch.__version__


def test_plain_sites_train_every_stream(folder):
    extra = '[sharing]\nrule = "plain"\n'
    site = Site(folder)
    shaken = site.handshake(Invitation(task(extra=extra).run_toml))
    assert "stream:liver-mr" in shaken.group_hashes
    assert "liver-mr" not in shaken.streams
    reply = site.train_round(task(extra=extra))
    assert set(reply.weights.values()) == {(10.0,)}
    assert not reply.updates["stream:liver-mr"].any()


def test_where_the_teacher_starts_a_round(folder, tmp_path, monkeypatch):
    """At the start of the run it makes no difference; afterwards it does."""
    replies = {}
    for choice in ("own", "global"):
        site = Site(folder, tmp_path / choice)
        extra = f'teacher-start = "{choice}"\n'
        replies[choice] = [site.train_round(task(number, extra=extra)) for number in (1, 2)]
        with monkeypatch.context() as patched:
            patched.setattr(Trainer, "update_teacher", lambda trainer, momentum, counts: None)
            site.train_round(task(3, extra=extra))
        start, kept = build_model(parse_run(RUN)).state_dict(), site._warm[1].trainer.teacher.state_dict()
        assert all(torch.equal(kept[name], start[name]) for name in kept) == (choice == "global")
    assert same(replies["own"][0], replies["global"][0])
    assert not same(replies["own"][1], replies["global"][1])


def test_the_teacher_starts_at_the_servers_average(folder):
    """And so the student's own teacher, and the student itself, do not matter."""
    extra = 'teacher-start = "server-ema"\nteacher-momentum = [1.0, 1.0]\n'
    first, asked = task(1, extra=extra), task(2, extra=extra)
    average = {group: flat + np.float32(0.5) for group, flat in asked.groups.items()}
    site = Site(folder)
    site.train_round(replace(first, teacher=first.groups))
    site.train_round(replace(asked, teacher=average))
    session = site._warm[1]
    kept = session.trainer.teacher.state_dict()
    for name, expected in session.manifest.unpack_all(average).items():
        assert np.array_equal(kept[name].numpy(), expected), name
    with pytest.raises(ProtocolError, match="missing group"):
        site.train_round(asked)


def stepped(asked: RoundTask, groups: dict, number: int) -> RoundTask:
    """A task of round `number` whose step leads from `groups` to the asked parameters plus what rounding does."""
    run = parse_run(asked.run_toml)
    model = build_model(run)
    manifest = GroupManifest.of(model.parameter_groups(), model.state_dict())
    step = {}
    for group, flat in groups.items():
        step |= code_step("int8", manifest, group, asked.groups[group] - flat, {})[0]
    reached = take_step("int8", manifest, groups, step)
    return replace(asked, round_number=number, groups=step, digests=digests(reached)), reached


def test_a_step_leads_where_all_parameters_would(folder, tmp_path):
    """Warm, after a restart, and repeated."""
    extra = '[sharing]\ncoding = "int8"\n'
    first = task(1, extra=extra)
    goal = replace(first, groups={group: flat + np.float32(0.01) for group, flat in first.groups.items()})
    step, reached = stepped(goal, first.groups, 2)
    whole = Site(folder, tmp_path / "whole")
    whole.train_round(first)
    expected = whole.train_round(replace(goal, round_number=2, groups=reached))
    site = Site(folder, tmp_path / "step")
    site.train_round(first)
    for each in (site, Site(folder, tmp_path / "step"), site):
        assert same(each.train_round(step), expected)


def test_a_step_from_elsewhere_is_refused_and_all_parameters_mend_it(folder, tmp_path):
    extra = '[sharing]\ncoding = "int8"\n'
    first = task(1, extra=extra)
    step, reached = stepped(first, first.groups, 2)
    site = Site(folder, tmp_path / "state")
    with pytest.raises(ProtocolError, match="round 2: the step does not lead from this site's parameters"):
        site.train_round(step)  # new
    site.train_round(first)
    drifted = {group: flat + np.float32(1e-3) for group, flat in first.groups.items()}
    site.train_round(replace(first, round_number=2, groups=drifted))
    with pytest.raises(ProtocolError, match="the step does not lead"):
        site.train_round(replace(step, round_number=3))
    assert site.train_round(replace(first, round_number=3, groups=reached)).state_round == 2
    with pytest.raises(ProtocolError, match="round 6: the step does not lead"):
        site.train_round(replace(step, round_number=6))  # away for two rounds


@pytest.mark.parametrize("name", ["site.log", "departures.jsonl", "ledger", "runs"])
def test_a_run_may_be_named_like_a_file_of_the_site(folder, name):
    """An error before, in between and after: the log takes it, and the run goes on."""
    site = Site(folder)
    for number in (1, 2):
        site.log_error(ValueError(f"before {number}"))
        AuditLog(site.state_dir).append(Frame.error("x"), b"x")
        assert site.train_round(task(number, run_id=name)).state_round == number - 1
    assert (site.state_dir / "site.log").read_text().count("ValueError: before") == 2
    assert len(list(AuditLog(site.state_dir).lines())) == 2


def test_a_round_moves_every_group(folder):
    reply = Site(folder).train_round(task())
    assert reply.weights == {"backbone": (10,), "head": (10,), "stream:brain-mr": (5,), "stream:heart-mr": (5,)}
    assert all(update.any() and update.dtype == np.float32 for update in reply.updates.values())
    assert reply.state_round == 0
    assert np.isfinite([reply.loss, reply.validation_loss]).all()


def test_a_site_validates_every_so_many_rounds_and_in_the_last(folder):
    run = RUN.replace("validate-every = 1", "validate-every = 4")
    replies = [Site(folder).train_round(replace(task(number), run_toml=run)) for number in range(1, 7)]
    assert [reply.validation_loss is not None for reply in replies] == [False, False, False, True, False, True]


def test_a_round_trains_and_validates_on_the_right_subjects_at_its_place_in_the_run(folder, monkeypatch):
    real, seen = Trainer.train, []

    def note(trainer, store, indices, **words):
        seen.append(
            (indices.tolist(), words["first_step"], words["num_steps"], words["round_number"], words["profile"])
        )
        return real(trainer, store, indices, **words)

    monkeypatch.setattr(Trainer, "train", note)
    sums = lambda trainer, store, indices, site: Validation(float(indices.sum()), len(indices))  # noqa: E731
    monkeypatch.setattr(Trainer, "validate", sums)
    profile = {"brain-mr": 1.5, "heart-mr": 0.5}
    assert Site(folder).train_round(replace(task(4), profile=profile)).validation_loss == 5.0
    assert seen == [([0, 1, 2, 3, 4], 6, 2, 4, profile)]


def test_skipped_steps_do_not_weigh(folder, monkeypatch):
    """One finite step of two; then none, which leaves the model where it was."""
    from panfm.training.objectives.latent.objective import LatentObjective

    real, calls = LatentObjective.loss, []

    def often_nan(self, *views):
        calls.append(0)
        return real(self, *views) * (1.0 if len(calls) == 2 else float("nan"))

    monkeypatch.setattr(LatentObjective, "loss", often_nan)
    site = Site(folder)
    reply = site.train_round(task())
    assert (reply.num_skipped, reply.weights["backbone"], reply.weights["stream:brain-mr"]) == (1, (5,), (5,))
    reply = site.train_round(task(2))
    assert reply.num_skipped == 2
    assert set(reply.weights.values()) == {(0.0,)}
    assert not any(update.any() for update in reply.updates.values())


def test_a_repeated_round_gives_the_same_reply(folder):
    warm = Site(folder)
    first, second = warm.train_round(task(1)), warm.train_round(task(2))
    assert second.state_round == 1
    assert same(warm.train_round(task(2)), second)
    assert same(Site(folder).train_round(task(2)), second)
    assert same(warm.train_round(task(1)), first)
    assert same(warm.train_round(task(2)), second)


@pytest.mark.parametrize("coding", ["bf16", "int8"])
def test_what_coding_lost_is_private_and_comes_with_the_next_round(folder, coding):
    extra = f'[sharing]\ncoding = "{coding}"\n'
    warm = Site(folder)
    first, second = warm.train_round(task(1, extra=extra)), warm.train_round(task(2, extra=extra))
    assert first.updates["backbone"].dtype == {"bf16": np.uint16, "int8": np.int8}[coding]
    assert same(Site(folder).train_round(task(2, extra=extra)), second)
    lost = StateStore(folder / ".panfm" / "state", "run-1").load(1)
    names = {name for name in lost if name.startswith("coding.lost.")}
    assert names == {f"coding.lost.{group}" for group in task().groups}
    assert all(lost[name].any() for name in names)
    exact = Site(folder, folder / "exact").train_round(task(1))
    manifest = warm._session(task(extra=extra).run_toml).manifest
    for group, arrived in decode(coding, manifest, first.updates).items():
        np.testing.assert_allclose(arrived + lost[f"coding.lost.{group}"].numpy(), exact.updates[group], atol=1e-8)


def test_private_state_matters(folder, tmp_path):
    """The negative control of the test above: without round 1's state, round 2 is another."""
    kept, lost = Site(folder), Site(folder, tmp_path / "elsewhere")
    kept.train_round(task(1))
    fresh = lost.train_round(task(2))
    assert fresh.state_round == 0
    assert not same(fresh, kept.train_round(task(2)))


def test_memory_is_used_only_if_disk_agrees(folder):
    """Another process served round 2 and went back; this one must not go on from its own memory."""
    here, there = Site(folder), Site(folder)
    here.train_round(task(1))
    second = there.train_round(task(2))
    assert same(here.train_round(task(2)), second)
    third = there.train_round(task(3))
    assert same(here.train_round(task(3)), third)


@pytest.mark.slow
@pytest.mark.parametrize(
    "extra",
    ["", '[sharing]\ncoding = "int8"\n', '[sharing]\nhead = "private"\n'],
)
def test_sites_that_take_turns_at_one_trainer_do_not_meet(tmp_path, write_site, extra, monkeypatch):
    """Three sites of one process with the same streams, not always asked; beside them, each with its own."""
    for name in ("alpha", "beta", "gamma"):
        write_site(tmp_path / name, name, ("brain", "heart"))

    def rounds(state_dir) -> list:
        sites = {name: Site(tmp_path / name, state_dir / name) for name in ("alpha", "beta", "gamma")}
        order = "alpha beta gamma", "beta alpha", "gamma alpha beta", "alpha gamma"
        asked = [(name, number) for number, names in enumerate(order, start=1) for name in names.split()]
        found = [sites[name].train_round(task(number, extra=extra)) for name, number in asked]
        assert len({id(site._warm[1].trainer) for site in sites.values()}) == num_trainers
        return found

    num_trainers = 1
    together = rounds(tmp_path / "together")
    monkeypatch.setattr(session, "_trainers", session._trainers.__wrapped__)
    num_trainers = 3
    alone = rounds(tmp_path / "alone")
    assert all(map(same, together, alone))
    assert not same(together[0], together[1])


def test_a_site_that_was_away_goes_on_from_its_last_state(folder):
    site = Site(folder)
    site.train_round(task(1))
    assert site.train_round(task(6)).state_round == 1


def test_corrupted_state_stops_the_site_and_names_the_file(folder):
    Site(folder).train_round(task(1))
    path = folder / ".panfm" / "state" / "runs" / "run-1" / "round-000001.state"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"round-000001\.state: corrupted"):
        Site(folder).train_round(task(2))


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ({"round_number": 0}, "round 0: expected 1 to 6"),
        ({"round_number": 7}, "round 7: expected 1 to 6"),
        ({"run_id": "../other"}, "run id"),
        ({"groups": {**task().groups, "backbone": np.zeros(3, np.float32)}}, r"expected float32 \["),
        ({"groups": {"experts": np.zeros(3, np.float32)}}, "unknown group 'experts'"),
        ({"groups": {}}, "missing group"),
    ],
)
def test_a_task_that_does_not_fit_is_refused(folder, wrong, why):
    with pytest.raises(ProtocolError, match=why):
        Site(folder).train_round(replace(task(), **wrong))


def test_a_site_without_the_streams_of_the_run(tmp_path, write_site):
    folder = write_site(tmp_path / "delta", "delta", ("kidney",))
    with pytest.raises(DataError):
        Site(folder).handshake(Invitation(task().run_toml))


def test_limits_win(tmp_path, write_site):
    folder = write_site(
        tmp_path / "beta", "beta", ("brain", "heart"), extra='[limits]\nmay-leave = ["updates", "counts"]\n'
    )
    reply = Site(folder).train_round(task())
    assert (reply.loss, reply.validation_loss, reply.num_skipped, reply.saliency) == (None, None, None, {})
    closed = write_site(tmp_path / "gamma", "gamma", ("brain",), extra='[limits]\nmay-leave = ["updates"]\n')
    for ask in (lambda site: site.handshake(Invitation(task().run_toml)), lambda site: site.train_round(task())):
        with pytest.raises(ProtocolError, match="lacks counts"):
            ask(Site(closed))


def test_nothing_private_is_in_the_bytes_of_a_handshake(folder):
    """Counts, names of software and layout; no subject, path, label or array."""
    records = Site(folder).handshake(Invitation(task().run_toml)).to_records()
    assert (records.arrays, records.metrics) == ({}, {})
    tables = {f"{key}-{part}" for key in ("streams", "versions", "groups") for part in ("names", "values")}
    assert set(records.config) == {"site", "subjects", "experiment"} | tables
    sent = {key: value for key, value in records.config.items() if key != "experiment"}
    assert records.config["experiment"] == experiment_hash(parse_run(RUN))
    assert (sent["site"], sent["subjects"], sent["streams-values"]) == ("alpha", 5, [5, 5])
    assert sent["versions-names"] == ["panfm", "torch", "python"]
    assert sent["groups-values"] == list(Site(folder)._session(task().run_toml).manifest.hashes().values())
    words = repr(sent)
    assert "alpha-0" not in words
    assert str(folder) not in words
    assert ".nii" not in words


def test_nothing_private_is_in_the_bytes_of_a_reply(folder):
    """Every byte that leaves, against the private state the round left behind, the images and the subjects' names."""
    site = Site(folder)
    site.train_round(task(1))
    reply = site.train_round(task(2))
    records = reply.to_records()
    sent = b"".join(array.tobytes() for array in records.arrays.values())
    sent += repr([records.metrics, records.config]).encode()
    private = StateStore(folder / ".panfm" / "state", "run-1").load(2)
    assert any(name.startswith("teacher.") for name in private)
    assert any(name.startswith("optimiser.") for name in private)
    for name, tensor in private.items():
        if tensor.numel() > 4 and tensor.any() and tensor.unique().numel() > 2:
            assert tensor.numpy().tobytes() not in sent, name
    assert b"alpha-0" not in sent
    assert str(folder).encode() not in sent
    update_bytes = sum(task().groups[group].nbytes for group in reply.updates)
    assert len(b"".join(array.tobytes() for array in records.arrays.values())) == update_bytes
    assert {key.split("/")[0] for key in records.metrics} == {
        "weight", "saliency", "loss", "validation-loss", "num-skipped"
    }  # fmt: skip
    assert set(records.config) == {"run-id", "round", "state-round"}
