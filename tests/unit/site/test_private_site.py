"""A site in a private run: every byte it sends is public or bought, and its budget is its own."""

import multiprocessing
import os
import signal
import socket
import stat
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tomli_w
import torch

from panfm.cli.site_lines import message_line
from panfm.config import dump_toml, experiment_hash, parse_run
from panfm.errors import BudgetError, ConfigError, LedgerError, LimitError, ProtocolError
from panfm.models import build_model
from panfm.privacy import patient_sums, private_step
from panfm.privacy.ledger import mechanisms_of
from panfm.privacy.mechanisms import epsilon
from panfm.privacy.private_step import PrivateGradient
from panfm.sharing.frames import Frame, Kind, encode, receive
from panfm.sharing.groups import GroupManifest
from panfm.sharing.messages import Invitation, RoundReply, RoundTask
from panfm.sharing.weights import GroupWeights
from panfm.site import Site, answer
from panfm.site.audit_log import AuditLog
from panfm.site.past_runs import states_of_past_runs
from panfm.site.patient_budget import PatientBudget
from panfm.site.state import StateStore, end_run
from tests.conftest import NO_FLOORS

RUN = """
name = "small"
seed = 3
[streams]
brain-mr = { spacing-mm = [8.0, 8.0, 8.0], shape = [8, 8, 8], patch = [4, 4, 8] }
heart-mr = { spacing-mm = [8.0, 8.0, 8.0], shape = [8, 8, 8], patch = [4, 4, 8] }
[train]
rounds = 6
local-steps = 2
validate-every = 1
[objective]
standardise = false
"""
RANDOM = '[masking]\npolicy = "random"\n'
GUIDED = '[masking]\nsaliency = "attention"\n'
DEX = '[model]\nbackbone = "director-experts"\n[model.experts]\nbalance-weight = [0.0, 0.0]\n'
PRIVACY = """
[patient-dp]
epsilon = 9.0
delta = 1e-3
public-subjects = 40
noise-multiplier = 1.5
sample-rate = 0.5
"""
PUBLIC = "delta = 1e-3\npublic-subjects = 40\n"


def task(round_number=1, *, run_id="run-1", extra=RANDOM, privacy=PRIVACY) -> RoundTask:
    run = parse_run(RUN + extra + privacy)
    model = build_model(run)
    tensors = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    manifest = GroupManifest.of(model.parameter_groups(), tensors)
    return RoundTask(run_id, round_number, dump_toml(run), manifest.pack_all(tensors))


@pytest.fixture
def site(tmp_path, write_site):
    return Site(write_site(tmp_path / "alpha", "alpha", ("brain", "heart")))


def spent(site):
    return PatientBudget(site.folder, site.config, site.state_dir).ledger.entries()


@pytest.mark.parametrize(("extra", "bought"), [(RANDOM, {"updates"}), (GUIDED, {"updates", "saliency"})])
def test_every_field_of_a_reply_is_public_or_bought(site, extra, bought):
    """The negative control is test_site.py: without privacy the same fields hold losses and counts."""
    asked = task(extra=extra)
    records = site.train_round(asked).to_records()
    released = {name for each in mechanisms_of(spent(site)[-1]) for name in each.releases}
    assert released == bought
    public = {"weight/backbone": [80.0], "weight/head": [80.0]}
    public |= {"weight/stream:brain-mr": [40.0], "weight/stream:heart-mr": [40.0]}
    saliency = {"saliency/brain-mr", "saliency/heart-mr"} if "saliency" in bought else set()
    assert set(records.arrays) == set(asked.groups)  # all of them updates
    assert {key: value for key, value in records.metrics.items() if key not in saliency} == public
    assert set(records.metrics) - set(public) == saliency
    assert records.config == {"run-id": "run-1", "round": 1, "state-round": 0}


class Fixed:
    """In place of what the mechanisms release: numbers that no patient decides. The sums are made, and thrown away."""

    def __init__(self, monkeypatch):
        self.random = np.random.default_rng(0)
        for owner, name in ((PrivateGradient, "total"), (patient_sums, "saliency_sum")):
            monkeypatch.setattr(owner, name, self.instead_of(getattr(owner, name)))
        for module in (private_step, patient_sums):
            monkeypatch.setattr(module, "with_noise", lambda value, deviation: value)

    def instead_of(self, summed):
        def fixed(*words):
            found = summed(*words)
            if isinstance(found, dict):
                return {name: self.numbers(value) for name, value in found.items()}
            return self.numbers(found)

        return fixed

    def numbers(self, like):
        return torch.from_numpy(self.random.normal(size=tuple(like.shape)))


def all_that_leaves(folder, tasks) -> list[bytes]:
    """Every byte: the answer to an invitation, to rounds, and to what it refuses."""
    site = Site(folder)
    asked = [Frame(Kind.HANDSHAKE, Invitation(tasks[0].run_toml).to_records())]
    asked += [Frame(Kind.ROUND, each.to_records()) for each in tasks]
    asked.append(Frame(Kind.ROUND, task(99).to_records()))
    return [encode(answer(site, each)) for each in asked]


SLOW = [RANDOM, RANDOM + DEX, RANDOM + '[sharing]\ncoding = "int8"\n']


@pytest.mark.parametrize("extra", [GUIDED, *(pytest.param(extra, marks=pytest.mark.slow) for extra in SLOW)])
def test_every_byte_follows_from_what_the_ledger_lists_and_from_public_words(tmp_path, write_site, monkeypatch, extra):
    """Two sites of one public name, with other patients and other numbers of them: once what the mechanisms release is
    fixed, they send the same bytes. As they are, none of the rounds' bytes agree."""
    tasks = [_without_experts(task(number, extra=extra)) for number in (1, 2)]
    folders = [write_site(tmp_path / name, name, ("brain", "heart"), size) for name, size in (("beta", 5), ("eta", 9))]
    for folder in folders:
        (folder / "site.toml").write_text(tomli_w.dumps({"name": "alpha", "limits": NO_FLOORS}))
    first, second = (all_that_leaves(folder, tasks) for folder in folders)
    assert [one == other for one, other in zip(first, second, strict=True)] == [True, False, False, True]
    sent = []
    for folder in folders:
        with monkeypatch.context() as patched:
            Fixed(patched)
            (folder / ".panfm" / "state").rename(folder / "before")
            (folder / ".panfm" / "ledger").rename(folder / "before" / "ledger")
            sent.append(all_that_leaves(folder, tasks))
    assert sent[0] == sent[1]
    for content, entry in zip(sent[0][1:3], spent(Site(folder))[1:], strict=True):
        reply = RoundReply.from_records(_read(content).records)
        assert encode(Frame(Kind.ANSWER, reply.to_records())) == content
        released = {name for each in mechanisms_of(entry) for name in each.releases}
        assert released == ({"updates", "saliency"} if extra == GUIDED else {"updates"})


def _read(content: bytes) -> Frame:
    here, there = socket.socketpair()
    with here, there, ThreadPoolExecutor(1) as pool:
        pool.submit(there.sendall, content)
        return receive(here, timeout_s=60.0)


def test_a_handshake_tells_public_numbers_only(site):
    asked = task()
    handshake = site.handshake(Invitation(asked.run_toml))
    assert (handshake.subjects, handshake.streams) == (40, {"brain-mr": 40, "heart-mr": 40})
    assert handshake.experiment == experiment_hash(parse_run(asked.run_toml))
    assert not spent(site)


def test_the_sites_own_public_number_wins(site, tmp_path, write_site):
    folder = write_site(tmp_path / "beta", "beta", ("brain",), extra="[limits]\npublic-subjects = 60\n")
    asked = task()
    handshake = Site(folder).handshake(Invitation(asked.run_toml))
    assert handshake.subjects == 60
    assert handshake.experiment == experiment_hash(parse_run(asked.run_toml))
    folder = write_site(tmp_path / "gamma", "gamma", ("brain",), extra="[limits]\npublic-subjects = 200\n")
    with pytest.raises(ConfigError, match=r"limits.public-subjects: 200 patients: patient-dp.delta: 0.001 is above"):
        Site(folder).handshake(Invitation(asked.run_toml))


def test_a_public_number_that_breaks_the_guarantee_is_refused_though_the_run_acknowledges_what_it_has_not(
    tmp_path, write_site
):
    """The server would claim what this site's ledger could not."""
    folder = write_site(tmp_path / "gamma", "gamma", ("brain",), extra="[limits]\npublic-subjects = 200\n")
    asked = task(privacy=PRIVACY + "acknowledge-broken-guarantee = true\n")
    with pytest.raises(ConfigError, match=r"limits.public-subjects: 200 patients"):
        Site(folder).train_round(asked)


def test_the_smaller_delta_wins(tmp_path, write_site):
    for delta, expected in ((1e-5, 1e-5), (0.1, 1e-3)):
        site = Site(write_site(tmp_path / f"{delta}", "beta", ("brain", "heart"), extra=f"[limits]\ndelta = {delta}\n"))
        site.train_round(task())
        entry = spent(site)[-1]
        assert entry["delta"] == expected
        assert entry["epsilon"] == epsilon(mechanisms_of(entry), expected)


def test_a_site_with_a_limit_takes_part_in_private_runs_only(tmp_path, write_site):
    site = Site(write_site(tmp_path / "beta", "beta", ("brain", "heart"), extra=f"[limits]\nepsilon = 2.0\n{PUBLIC}"))
    broken = PRIVACY + "acknowledge-broken-guarantee = true\n"
    for each in (task(privacy=""), task(privacy=broken)):
        with pytest.raises(ProtocolError, match=r"limits.epsilon"):
            site.handshake(Invitation(each.run_toml))
        with pytest.raises(ProtocolError, match=r"limits.epsilon"):
            site.train_round(each)


def test_what_is_spent_can_be_told_after_each_round(site):
    assert site.epsilon_spent is None
    site.handshake(Invitation(task().run_toml))
    assert site.epsilon_spent is None
    for number in (1, 2):
        site.train_round(task(number))
        assert site.epsilon_spent == spent(site)[-1]["epsilon"]
    site.handshake(Invitation(task(privacy="").run_toml))
    assert site.epsilon_spent is None  # this run spends nothing, and its messages say so


@pytest.mark.slow
@pytest.mark.parametrize("limits", [f"[limits]\nepsilon = 8.0\n{PUBLIC}", ""])
def test_the_smaller_budget_stops_the_site(tmp_path, write_site, limits):
    site = Site(write_site(tmp_path / "beta", "beta", ("brain", "heart"), extra=limits))
    budget = 8.0 if limits else 9.0
    tasks = [task(number, privacy=PRIVACY.replace("1.5", "0.7")) for number in range(1, 7)]
    with pytest.raises(BudgetError, match=rf"of {budget:g} at delta 0.001"):
        list(map(site.train_round, tasks))
    epsilons = [entry["epsilon"] for entry in spent(site)[1:]]
    assert epsilons == sorted(epsilons)
    assert 1 <= len(epsilons) < 6
    assert epsilons[-1] <= budget


@pytest.mark.slow
def test_killing_and_resuming_and_another_run_never_lower_what_is_spent(tmp_path, write_site, monkeypatch):
    site = Site(write_site(tmp_path / "beta", "beta", ("brain", "heart"), extra="[limits]\nruns-at-once = 2\n"))
    site.train_round(task())
    first = spent(site)[-1]["epsilon"]

    def killed(*args, **more):
        raise KeyboardInterrupt

    monkeypatch.setattr(PrivateGradient, "finish", killed)
    with pytest.raises(KeyboardInterrupt):
        Site(site.folder).train_round(task(2))
    monkeypatch.undo()
    after_kill = spent(site)[-1]["epsilon"]
    Site(site.folder).train_round(task(2))
    Site(site.folder).train_round(task(1, run_id="run-2"))
    found = [entry["epsilon"] for entry in spent(site)[1:]]
    assert first < after_kill
    assert found == sorted(found)
    assert len(set(found)) == 4


def _dies_in_its_round(folder, asked):
    PrivateGradient.finish = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
    Site(folder).train_round(asked)


@pytest.mark.slow
def test_a_process_that_is_killed_in_a_round_has_paid_for_it(site):
    site.train_round(task())
    process = multiprocessing.get_context("spawn").Process(target=_dies_in_its_round, args=(site.folder, task(2)))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    site.train_round(task(2))
    entries = spent(site)[1:]
    assert [entry["round"] for entry in entries] == [1, 2, 2]
    assert entries[0]["epsilon"] < entries[1]["epsilon"] < entries[2]["epsilon"]


def test_a_task_that_does_not_fit_costs_nothing(site):
    asked = task()
    wrong = RoundTask("run-1", 1, asked.run_toml, {"backbone": np.zeros(3, dtype=np.float32)})
    with pytest.raises(ProtocolError):
        site.train_round(wrong)
    assert not spent(site)


def test_a_ledger_that_is_gone_stops_the_site(site):
    site.train_round(task())
    (site.folder / ".panfm/ledger/ledger.jsonl").unlink()
    with pytest.raises(LedgerError, match="missing, foreign or cut off"):
        site.train_round(task(2))


def sent(site, asked) -> bytes:
    """Bytes of the answer to a round."""
    return encode(answer(site, Frame(Kind.ROUND, asked.to_records())))


def test_an_identical_question_has_the_same_bytes_and_is_paid_for_once(site):
    """Also in another process; the next round is trained from where the first answer ended."""
    first = sent(site, task())
    assert sent(site, task()) == sent(Site(site.folder), task()) == first
    [path] = site.state_dir.glob("runs/*/reply.kept")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [entry["round"] for entry in spent(site)[1:]] == [1]
    reply = RoundReply.from_records(_read(sent(site, task(2))).records)
    assert reply.state_round == 1
    assert [entry["round"] for entry in spent(site)[1:]] == [1, 2]


def test_another_question_for_a_round_is_refused_and_removes_no_reply(site):
    first = sent(site, task())
    other = task()
    changed = RoundTask("run-1", 1, other.run_toml, other.groups, profile={"brain-mr": 1.5, "heart-mr": 0.5})
    with pytest.raises(ProtocolError, match="asked before with other parameters"):
        site.train_round(changed)
    assert sent(site, task()) == first


def test_a_reply_that_is_gone_or_of_another_run_is_none(tmp_path, write_site):
    """Without its own reply a round is trained and paid for again, from the same private state."""
    site = Site(write_site(tmp_path / "beta", "beta", ("brain", "heart"), extra="[limits]\nruns-at-once = 2\n"))
    first = sent(site, task())
    other = sent(site, task(run_id="run-2"))
    runs = site.state_dir / "runs"
    (runs / "run-1" / "reply.kept").replace(runs / "run-2" / "reply.kept")
    again = sent(site, task(run_id="run-2"))
    assert len({first, other, again}) == 3
    assert len({sent(site, task()), first}) == 2
    assert [entry["run"] for entry in spent(site)[1:]] == ["run-1", "run-2", "run-2", "run-1"]
    epsilons = [entry["epsilon"] for entry in spent(site)[1:]]
    assert epsilons == sorted(epsilons)


def test_the_reply_goes_with_the_next_question_and_with_the_end_of_the_run(site):
    site.train_round(task())
    [path] = site.state_dir.glob("runs/*/reply.kept")
    before, limits = path.read_bytes(), site.config.limits
    site.train_round(task(2))
    assert path.read_bytes() != before
    assert path not in states_of_past_runs(site.state_dir, limits)
    end_run(site.state_dir, "run-1")
    assert not path.exists()
    path.write_bytes(before)
    assert path in states_of_past_runs(site.state_dir, limits)


def test_a_kept_reply_stays_where_the_site_lets_no_more_leave(tmp_path, write_site):
    """A lower epsilon, a ledger without the round: nothing that is not covered today leaves."""
    site = Site(write_site(tmp_path / "beta", "beta", ("brain", "heart")))
    site.train_round(task())
    before = (site.folder / "site.toml").read_text()
    limits = NO_FLOORS | {"epsilon": 0.1, "delta": 1e-3, "public-subjects": 40}
    (site.folder / "site.toml").write_text(tomli_w.dumps({"name": "beta", "limits": limits}))
    with pytest.raises(BudgetError):
        Site(site.folder).train_round(task())
    (site.folder / "site.toml").write_text(before)
    (site.folder / ".panfm/ledger/ledger.jsonl").unlink()
    with pytest.raises(LedgerError):
        site.train_round(task())


def test_a_round_that_fails_again_and_again_is_paid_for_three_times_a_day(site, monkeypatch):
    def dies(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("panfm.site.kept_reply.keep_reply", dies)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            site.train_round(task())
    with pytest.raises(LimitError, match="round 1: paid for 3 times within a day"):
        site.train_round(task())
    assert len(spent(site)[1:]) == 3
    monkeypatch.undo()
    site.train_round(task(2))


def test_a_repeat_is_in_the_audit_log_as_one_and_counts_as_no_payment(site):
    log = AuditLog(site.state_dir)
    for _ in range(2):
        frame = answer(site, Frame(Kind.ROUND, task().to_records()))
        log.append(frame, encode(frame), privacy=site.privacy, epsilon=site.epsilon_spent, is_repeat=site.is_repeat)
    assert [line.get("repeat", False) for line in log.lines()] == [False, True]
    assert log.private_rounds().count == 1
    assert [", repeated" in message_line(line) for line in log.lines()] == [False, True]
    sent(site, task(2))
    assert [entry["round"] for entry in spent(site)[1:]] == [1, 2]


def test_private_experts_are_trained_by_the_private_step(site):
    site.train_round(_without_experts(task(extra=RANDOM + DEX)))
    [entry] = spent(site)[1:]
    assert [each.name for each in mechanisms_of(entry)] == ["gradients"]


@pytest.mark.parametrize("rate", ["0.01", "1.0"])
def test_the_server_accepts_the_weights_of_private_experts(site, rate):
    """Whether a Poisson sample is smaller or larger than `train.batch-size`."""
    privacy = PRIVACY.replace("sample-rate = 0.5", f"sample-rate = {rate}")
    asked = _without_experts(task(extra=RANDOM + DEX, privacy=privacy))
    reply, run = site.train_round(asked), parse_run(asked.run_toml)
    model = build_model(run)
    manifest = GroupManifest.of(model.parameter_groups(), model.state_dict())
    streams = dict.fromkeys(run.streams, 40)
    rule = GroupWeights(run.sharing, run.train, run.site_dp, manifest)
    for group, weights in reply.weights.items():
        limits = rule.limits(group, subjects=40, subjects_per_stream=streams)
        assert all(0.0 < weight <= limit for weight, limit in zip(weights, limits, strict=True))


def _without_experts(asked: RoundTask) -> RoundTask:
    kept = {group: flat for group, flat in asked.groups.items() if group not in ("experts", "router")}
    return RoundTask(asked.run_id, asked.round_number, asked.run_toml, kept)


@pytest.mark.slow
def test_a_dry_run_spends_nothing(site):
    from panfm.site.dry_run import dry_run

    for paid in (0, 1):
        found = dry_run(site.folder, parse_run(RUN + RANDOM + PRIVACY))
        assert found.handshake.subjects == 40
        assert found.reply.loss is None
        assert len(spent(site)[1:]) == paid
        site.train_round(task())


def test_the_noise_that_is_drawn_is_the_noise_that_is_booked(site, monkeypatch):
    """As many times, and of that size, for gradients and saliency."""
    drawn = {}

    def note(name, real):
        def with_noise(value, deviation):
            drawn.setdefault(name, []).append(deviation)
            return real(value, deviation)

        return with_noise

    for name, module in (("gradients", private_step), ("saliency", patient_sums)):
        monkeypatch.setattr(module, "with_noise", note(name, module.with_noise))
    site.train_round(task(extra=GUIDED, privacy=PRIVACY + "clip-norm = 0.25\n"))
    booked = {each.name: each for each in mechanisms_of(spent(site)[-1])}
    assert booked.keys() == drawn.keys()
    num_parameters = len(list(site._warm[1].trainer.model.parameters()))
    for name, per_release in (("gradients", num_parameters), ("saliency", 1)):
        assert len(drawn[name]) == booked[name].count * per_release
        assert set(drawn[name]) == {booked[name].noise * booked[name].sensitivity}


@pytest.mark.slow
@pytest.mark.parametrize("extra", [RANDOM + '[sharing]\ncoding = "int8"\n', GUIDED + DEX])
def test_a_run_without_privacy_in_the_same_process_leaves_nothing_to_a_private_one(
    tmp_path, write_site, monkeypatch, extra
):
    """Model, teacher, optimiser, what coding lost: with the mechanisms' releases fixed, a process that has trained
    without privacy sends and keeps the same numbers as a new one."""
    site = Site(write_site(tmp_path / "beta", "beta", ("brain", "heart"), extra="[limits]\nruns-at-once = 2\n"))
    for number in (1, 2):
        site.train_round(_without_experts(task(number, run_id="plain", extra=extra, privacy="")))
    found = []
    for each in (site, Site(site.folder, tmp_path / "new")):
        with monkeypatch.context() as patched:
            Fixed(patched)
            sent = [each.train_round(_without_experts(task(number, extra=extra))).updates for number in (1, 2)]
        kept = StateStore(each.state_dir, "run-1").load(2)
        found.append([{name: array.tobytes() for name, array in arrays.items()} for arrays in sent])
        found[-1].append({name: tensor.numpy().tobytes() for name, tensor in kept.items()})
    assert found[0] == found[1]
