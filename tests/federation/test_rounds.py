"""Whole runs over three small hospitals: the real ServerApp, ClientApp, strategy and files, in process."""

import io
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import tomli_w
import torch
from flwr.clientapp import ClientApp
from rich.console import Console

from client.app import app as client_app
from panfm.config import dump_toml, parse_run
from panfm.errors import RunError
from panfm.evaluate.embed import load_model
from panfm.models import build_model
from panfm.site.session import Session
from panfm.site.state import StateStore
from panfm.training.objectives.latent.objective import LatentObjective
from panfm.training.trainer import Trainer
from server.app import app as server_app
from server.console import Progress
from server.rounds import run_federation
from server.run_folder import RunFolder
from simulations.engines.job import Job
from simulations.engines.local import LocalGrid, run_apps
from simulations.engines.local import run as run_local
from strategies import Memory
from strategies.round_messages import Downlink
from tests.unit.server.test_tracking import events


def lines(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "rounds.jsonl").read_text().splitlines()]


def model_bytes(run_dir: Path) -> bytes:
    return (run_dir / "model" / "model.safetensors").read_bytes()


def exported(run_dir: Path) -> dict[str, np.ndarray]:
    return safetensors.numpy.load(model_bytes(run_dir))


def test_a_run_leaves_its_folder(federation):
    run_dir = federation.run("first")
    assert [line["round"] for line in lines(run_dir)] == [1, 2, 3]
    last = lines(run_dir)[-1]
    assert set(last["sites"]) == {"alpha", "beta", "gamma"}
    assert last["coverage"] == {"brain-mr": ["alpha", "gamma"], "heart-mr": ["alpha", "beta"], "liver-mr": ["gamma"]}
    assert last["sites"]["alpha"]["state_round"] == 2
    assert set(last["sites"]["gamma"]["saliency"]) == {"brain-mr", "liver-mr"}
    assert np.isfinite([last["loss"], last["sites"]["beta"]["validation_loss"]]).all()
    assert last["rejected"] == {}
    tensors = safetensors.numpy.load(model_bytes(run_dir))
    run = federation.describe()
    model = build_model(run)
    model.load_state_dict({name: torch.from_numpy(tensor) for name, tensor in tensors.items()})
    assert last["bytes_up"]["backbone"] == 3 * 4 * sum(parameter.numel() for parameter in model.backbone.parameters())
    assert last["bytes_up"] == last["bytes_down"]
    metadata = json.loads((run_dir / "model" / "metadata.json").read_text())
    assert (metadata["rounds"], metadata["sites"]) == (3, ["alpha", "beta", "gamma"])
    assert (run_dir / "model" / "run.toml").read_text() == (run_dir / "run.toml").read_text() == dump_toml(run)
    coverage = json.loads((run_dir / "sites.json").read_text())["coverage"]
    assert coverage["heart-mr"] == {"alpha": 5, "beta": 5}


@pytest.mark.slow
def test_the_same_seed_gives_the_same_model_and_another_does_not(federation):
    first = model_bytes(federation.run("first"))
    second = federation.run("second", "tracking.images=true")
    assert model_bytes(second) == first
    assert model_bytes(federation.run("third", "seed=4")) != first
    values = [value for event in events(second) for value in event.summary.value]
    assert values
    assert not any(value.HasField("image") for value in values)  # a server has none, whatever a description asks for


def test_every_parameter_has_moved_from_its_start(federation):
    tensors = safetensors.numpy.load(model_bytes(federation.run("first")))
    for name, start in build_model(federation.describe()).state_dict().items():
        assert not np.array_equal(tensors[name], start.numpy()), name


def test_a_stream_that_no_site_holds_stays_as_it_was(federation):
    shutil.rmtree(federation.sites / "gamma")
    tensors = safetensors.numpy.load(model_bytes(federation.run("two")))
    start = build_model(federation.describe()).state_dict()
    for name, tensor in tensors.items():
        assert np.array_equal(tensor, start[name].numpy()) == ("liver-mr" in name), name


def test_private_heads_stay_at_their_sites(federation):
    """Server, messages and the exported model do without them; each site goes on with its own."""
    run_dir = federation.run("private", "sharing.head=private")
    assert not any("head" in line[way] for line in lines(run_dir) for way in ("bytes_up", "bytes_down"))
    state = RunFolder.resume(run_dir).latest_state()
    assert set(state.groups) == {"backbone", "stream:brain-mr", "stream:heart-mr", "stream:liver-mr"}
    tensors = safetensors.numpy.load(model_bytes(run_dir))
    assert {name.split(".")[1] for name in tensors if name.startswith("heads.")} == {"streams"}
    model, run = load_model(run_dir / "model")
    seeded = build_model(run).state_dict()
    for name, value in model.state_dict().items():
        assert np.array_equal(value.numpy(), tensors.get(name, seeded[name].numpy())), name
    own = [StateStore(run_dir / "sites" / site, state.run_id).load(3) for site in ("alpha", "beta")]
    name = "student.heads.project.1.weight"
    assert not torch.equal(own[0][name], own[1][name])
    assert not any(torch.equal(each[name], seeded[name.removeprefix("student.")]) for each in own)


@pytest.mark.slow
def test_coded_updates_are_small_and_end_near_the_exact_model(federation):
    """One byte a number: a quarter of the bytes, and a model far closer to the exact one than that is to its start."""
    exact, start = exported(federation.run("exact", "train.rounds=2")), build_model(federation.describe()).state_dict()
    found = exported(federation.run("coded", "train.rounds=2", "sharing.coding=int8"))
    moved = max(np.abs(exact[name] - start[name].numpy()).max() for name in exact)
    assert 0.0 < max(np.abs(found[name] - exact[name]).max() for name in found) < 0.05 * moved
    whole, coded = (sum(lines(federation.folder / name)[-1]["bytes_up"].values()) for name in ("exact", "coded"))
    assert 0.25 < coded / whole < 0.27


def bytes_down(run_dir: Path) -> list[int]:
    return [sum(line["bytes_down"].values()) for line in lines(run_dir)]


class Forgetful(Downlink):
    """Sends everything to everyone."""

    def __init__(self, groups, memory, *, teacher, frozen) -> None:
        super().__init__(groups, Memory(), teacher=teacher, frozen=frozen)


@pytest.mark.slow
@pytest.mark.parametrize("coding", ["int8", "bf16"])
def test_steps_go_down_to_those_that_were_there_and_all_parameters_to_the_others(federation, monkeypatch, coding):
    """A site that fails in round 2 is sent everything in round 3; who gets what makes no difference to a bit."""
    real, failing = Session.train_round, {("gamma", 2)}

    def fails(self, task, states):
        if (self.site, task.round_number) in failing:
            raise OSError("away")
        return real(self, task, states)

    monkeypatch.setattr(Session, "train_round", fails)
    overrides = ("train.rounds=4", f"sharing.coding={coding}")
    run_dir = federation.run("steps", *overrides)
    first, second, third, fourth = bytes_down(run_dir)
    assert fourth == second < third < first
    assert second == pytest.approx({"bf16": 0.5, "int8": 0.254}[coding] * first, rel=0.01)
    monkeypatch.setattr("strategies.grouped.Downlink", Forgetful)
    whole = federation.run("whole", *overrides)
    assert bytes_down(whole) == [first] * 4
    assert model_bytes(whole) == model_bytes(run_dir)


def test_a_site_that_lost_its_place_says_so_and_is_sent_everything(federation, monkeypatch):
    """Its parameters are off by one bit in round 2: refused there, and back in round 3."""
    real = Session.train_round

    def drifts(self, task, states):
        if (self.site, task.round_number) == ("beta", 2) and task.digests:
            self._global = {group: flat + np.float32(1e-7) for group, flat in self._global.items()}
        return real(self, task, states)

    monkeypatch.setattr(Session, "train_round", drifts)
    run_dir = federation.run("drifted", "sharing.coding=int8")
    rejected = [line["rejected"] for line in lines(run_dir)]
    assert [list(each) for each in rejected] == [[], ["beta"], []]
    assert "the step does not lead from this site's parameters" in rejected[1]["beta"]
    assert lines(run_dir)[2]["sites"]["beta"]["state_round"] == 1
    assert bytes_down(run_dir)[2] > bytes_down(run_dir)[1]


@pytest.mark.slow
def test_teachers_start_at_the_servers_average(federation):
    """It is sent and counted; with momentum 0 it is the global model, and one runs as the other."""
    run_dir = federation.run("average", "train.teacher-start=server-ema", "train.server-ema=0.0")
    line = lines(run_dir)[1]
    assert line["bytes_down"] == {group: 2 * size for group, size in line["bytes_up"].items()}
    same_as = federation.run("global", "train.teacher-start=global")
    assert model_bytes(run_dir) == model_bytes(same_as)
    lazy = federation.run("lazy", "train.teacher-start=server-ema", "train.server-ema=0.9")
    assert model_bytes(lazy) != model_bytes(same_as)


@pytest.mark.slow
def test_plain_dilutes_what_few_sites_hold(federation):
    """One round: liver, held by one of three sites of equal weight, moves a third as far as under `grouped`."""
    start = build_model(federation.describe()).state_dict()

    def moved(name: str, *overrides: str) -> np.ndarray:
        tensors = safetensors.numpy.load(model_bytes(federation.run(name, "train.rounds=1", *overrides)))
        key = "streams.liver-mr.project.weight"
        return tensors[key] - start[key].numpy()

    grouped, plain = moved("grouped"), moved("plain", "sharing.rule=plain")
    assert grouped.any()
    np.testing.assert_allclose(plain, grouped / 3, rtol=1e-3, atol=1e-7)


def test_one_site_and_one_full_batch_is_central_training(federation):
    """K = 1, one round: the federation ends where the Trainer alone ends."""
    for name in ("beta", "gamma"):
        shutil.rmtree(federation.sites / name)
    changes = ("train.rounds=1", "train.local-steps=1", "train.batch-size=5", "train.warmup=0.0")
    changes += ("federation.min-sites=1",)
    federated = safetensors.numpy.load(model_bytes(federation.run("one", *changes)))
    run = federation.describe(*changes)
    from panfm.data.cache import open_store

    store = open_store(federation.sites / "alpha", run.streams)
    central = Trainer(run, ["brain-mr", "heart-mr"])
    central.train(store, store.indices("train"), first_step=0, num_steps=1, site="alpha", round_number=1)
    start = build_model(run).state_dict()
    for name, value in central.shared_state().items():
        np.testing.assert_allclose(federated[name], value.numpy(), atol=1e-6, rtol=0)
        assert not np.array_equal(value.numpy(), start[name].numpy()), name


class Tampered(ClientApp):
    """The real ClientApp, with a hand in its replies."""

    def __init__(self, tamper) -> None:
        super().__init__()
        self.tamper = tamper

    def __call__(self, message, context):
        return self.tamper(message, context, client_app(message, context))


def nan_from(partition: int):
    def tamper(message, context, reply):
        if context.node_config["partition-id"] == partition and message.metadata.message_type == "train":
            from flwr.app import Array

            arrays = reply.content.array_records["arrays"]
            arrays["backbone"] = Array(np.full_like(arrays["backbone"].numpy(), np.nan))
        return reply

    return Tampered(tamper)


def test_a_nan_reply_is_rejected_and_the_run_goes_on(federation):
    job = federation.job("nan")
    run_apps(server_app, nan_from(1), job)
    assert ["beta" in line["rejected"] for line in lines(job.run_dir)] == [True] * 3
    assert "backbone: update holds NaN" in lines(job.run_dir)[0]["rejected"]["beta"]
    assert all(np.isfinite(tensor).all() for tensor in safetensors.numpy.load(model_bytes(job.run_dir)).values())


def test_a_site_whose_state_is_corrupted_is_left_out(federation, monkeypatch):
    """An error at a site: scrubbed, tolerated, logged; the others go on."""
    real = Session.train_round

    def fails(self, task, states):
        if self.site == "gamma" and task.round_number == 2:
            raise OSError(28, "No space left on device", "/secret/path/patient-7")
        return real(self, task, states)

    monkeypatch.setattr(Session, "train_round", fails)
    run_dir = federation.run("failing")
    assert [line["rejected"] for line in lines(run_dir)] == [{}, {"gamma": "internal error (OSError)"}, {}]
    assert lines(run_dir)[1]["coverage"].keys() == {"brain-mr", "heart-mr"}
    assert lines(run_dir)[2]["sites"]["gamma"]["state_round"] == 1


def skip_all_at(monkeypatch, *sites: str) -> None:
    """At these sites no loss is finite."""
    real = LatentObjective.loss

    class Nowhere(Session):
        def train_round(self, task, states):
            with monkeypatch.context() as patch:
                if self.site in sites:
                    patch.setattr(LatentObjective, "loss", lambda *views: real(*views) * float("nan"))
                return super().train_round(task, states)

    monkeypatch.setattr("panfm.site.site.Session", Nowhere)


def test_a_site_that_skipped_all_its_steps_is_left_out(federation, monkeypatch):
    shutil.rmtree(federation.sites / "gamma")
    federation.run("without", "train.rounds=1", "federation.min-sites=1")
    reached = safetensors.numpy.load(model_bytes(federation.folder / "without"))
    skip_all_at(monkeypatch, "beta")
    run_dir = federation.run("skipping", "train.rounds=1", "federation.min-sites=1")
    assert "all local steps were skipped" in lines(run_dir)[0]["rejected"]["beta"]
    assert list(lines(run_dir)[0]["sites"]) == ["alpha"]
    assert lines(run_dir)[0]["coverage"] == {"brain-mr": ["alpha"], "heart-mr": ["alpha"]}
    skipping = safetensors.numpy.load(model_bytes(run_dir))
    assert not np.array_equal(skipping["streams.heart-mr.project.weight"], reached["streams.heart-mr.project.weight"])


def test_a_run_whose_every_step_was_skipped_fails(federation, monkeypatch):
    skip_all_at(monkeypatch, "alpha", "beta", "gamma")
    with pytest.raises(RunError, match=r"0 good replies, at least 2 needed.*all local steps were skipped"):
        federation.run("nothing")
    assert not (federation.folder / "nothing" / "model").exists()


def test_a_lost_quorum_fails_the_run_and_says_why(federation):
    job = federation.job("lost", "federation.min-sites=3")
    with pytest.raises(RunError, match=r"round 1: 2 good replies, at least 3 needed.*beta: backbone: update holds NaN"):
        run_apps(server_app, nan_from(1), job)
    assert not (job.run_dir / "model").exists()
    assert [line["round"] for line in lines(job.run_dir)] == [1]


def test_the_model_folder_tells_nothing_of_this_machine(federation):
    run = federation.describe("train.rounds=1")
    cohort = {"kind": "folder", "path": str(federation.folder)}
    folder = RunFolder.create(
        federation.folder / "told", parse_run(dump_toml(run) + "\n" + tomli_w.dumps({"cohort": cohort}))
    )
    run_local(Job(federation.sites, folder.path))
    assert str(federation.folder) in (folder.path / "run.toml").read_text()
    for path in (folder.path / "model").iterdir():
        assert str(federation.folder).encode() not in path.read_bytes(), path
    assert (folder.path / "model" / "run.toml").read_text() == dump_toml(run)


def test_a_site_that_cannot_take_part_stops_a_simulation(federation):
    (federation.sites / "beta" / "manifest.csv").write_text("subject,stream,path\n")
    job = federation.job("broken")
    with pytest.raises(RunError, match=r"2 of at least 3 sites can take part: node \d+: site beta: DataError"):
        run_local(job)
    told = json.loads((job.run_dir / "sites.json").read_text())
    assert list(told["sites"]) == ["alpha", "gamma"]
    [failed] = told["failed"]
    assert failed.endswith(": site beta: DataError: this site's data or private state is faulty; its log tells more")


def test_who_cannot_take_part_is_named_and_the_run_goes_on(federation, monkeypatch):
    """Nobody said how many sites there are: two of three are enough here."""
    monkeypatch.setattr("server.handshake._SETTLE_S", 0.0)
    (federation.sites / "beta" / "manifest.csv").write_text("subject,stream,path\n")
    job = federation.job("two")
    grid = LocalGrid(client_app, 3, job.run_config())
    console = Console(file=io.StringIO(), width=200)
    run_federation(grid, RunFolder.resume(job.run_dir), Progress(console))
    [reason] = json.loads((job.run_dir / "sites.json").read_text())["failed"]
    assert re.fullmatch(r"node \d+: site beta: DataError: this site's data or private state is faulty; .*", reason)
    assert f"left out: {reason}\n" in console.file.getvalue()
    assert json.loads((job.run_dir / "model" / "metadata.json").read_text())["sites"] == ["alpha", "gamma"]


NOTHING_KEPT = (
    "train.optimiser-state=fresh", "objective.name=mae", "masking.policy=random", "sharing.guards.norm-ratio=1e6",
)  # fmt: skip
"""A job whose sites have no private state to speak of."""
LOADED = ("sharing.coding=int8", "train.teacher-start=server-ema", "sharing.optimiser.kind=adam")
"""All that the server's memory may hold."""


@pytest.mark.slow
@pytest.mark.parametrize(("rounds_before", "overrides"), [(2, LOADED), (0, ()), (2, ()), (2, NOTHING_KEPT)])
def test_resuming_gives_the_bits_of_an_undisturbed_run(federation, rounds_before, overrides):
    undisturbed = model_bytes(federation.run("undisturbed", *overrides))
    answered = []

    def crash(message, context, reply):
        """Dies when two sites have trained the round and one has not."""
        answered.append((message.metadata.message_type, message.metadata.group_id))
        if answered.count(("train", str(rounds_before + 1))) == 2:
            raise KeyboardInterrupt
        return reply

    job = federation.job("killed", *overrides)
    with pytest.raises(KeyboardInterrupt):
        run_apps(server_app, Tampered(crash), job)
    assert not (job.run_dir / "model").exists()
    with (job.run_dir / "rounds.jsonl").open("a") as file:
        file.write('{"round": ')
    run_local(job)
    assert model_bytes(job.run_dir) == undisturbed
    assert [line["round"] for line in lines(job.run_dir)] == [1, 2, 3]


def test_a_finished_run_is_not_overwritten(federation):
    federation.run("first", "train.rounds=1")
    with pytest.raises(RunError, match="holds a run already"):
        federation.run("first", "train.rounds=1")


def test_the_federations_profile_comes_back_to_the_sites(federation):
    """What the sites said of saliency in a round, averaged, is sent with the next round's task."""
    sent = {}

    def listen(message, context, reply):
        if message.metadata.message_type == "train":
            config = message.content.config_records["config"]
            sent[message.metadata.group_id] = dict(
                zip(config.get("profile-names", []), config.get("profile-values", []), strict=True)
            )
        return reply

    job = federation.job("listening")
    run_apps(server_app, Tampered(listen), job)
    first, second, _ = (line["profile"] for line in lines(job.run_dir))
    assert set(first) == {"brain-mr", "heart-mr", "liver-mr"}
    assert sent == {"1": {}, "2": first, "3": second}
