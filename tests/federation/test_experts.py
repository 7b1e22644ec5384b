"""Director-Experts over three small hospitals: what leaves, what is averaged, where a site goes on from."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch

from client.app import app as client_app
from panfm.data.cache import open_store
from panfm.evaluate.embed import embed_store, load_model
from panfm.models import build_model
from panfm.sharing.groups import DIRECTOR, EXPERTS, ROUTER, GroupManifest
from panfm.site.state import StateStore
from panfm.training.trainer import Trainer
from server.app import app as server_app
from server.run_folder import RunFolder
from simulations.engines.local import run as run_local
from simulations.engines.local import run_apps
from tests.cases import quick

DEX = ("model.backbone=director-experts", "model.experts.count=[3, 2]", "model.experts.active=1", "train.rounds=2")
POOLED, NAIVE = "sharing.experts=pooled", "sharing.experts=naive"
SITES = ("alpha", "beta", "gamma")


def lines(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "rounds.jsonl").read_text().splitlines()]


def exported(run_dir: Path) -> dict[str, np.ndarray]:
    return safetensors.numpy.load((run_dir / "model" / "model.safetensors").read_bytes())


def heard(job) -> tuple[bytes, bytes]:
    """Run to the end; every byte that came to the sites, and every byte that left them."""
    down, up = [], []

    def listen(message, context):
        reply = client_app(message, context)
        for content, told in ((message.content, down), (reply.content, up)):
            for record in content.array_records.values():
                told.extend(array.numpy().tobytes() for array in record.values())
            told.append(repr([content.metric_records, content.config_records]).encode())
        return reply

    run_apps(server_app, listen, job)
    return b"".join(down), b"".join(up)


class Watched:
    """What every site had in its hands before and after every round's training, and the round's result."""

    def __init__(self, monkeypatch) -> None:
        self.rounds, self.groups = {}, {}
        real = Trainer.train

        def train(trainer, *args, site, round_number, **words):
            before = self._state(trainer)
            result = real(trainer, *args, site=site, round_number=round_number, **words)
            self.groups |= trainer.model.parameter_groups()
            self.rounds[site, round_number] = before, self._state(trainer), result
            return result

        monkeypatch.setattr(Trainer, "train", train)

    @staticmethod
    def _state(trainer: Trainer) -> dict[str, np.ndarray]:
        return {name: value.numpy().copy() for name, value in trainer.model.state_dict().items()}

    def rows(self) -> Iterator[tuple[str, bytes, bytes]]:
        """Every row of an expert or router that a round moved: where, its bytes, and the bytes of its update."""
        for (site, number), (before, after, _) in self.rounds.items():
            for name in after:
                if self.groups[name] in (EXPERTS, ROUTER):
                    for old, new in zip(before[name], after[name], strict=True):
                        if not np.array_equal(old, new):
                            yield f"{site} {number} {name}", new.tobytes(), (new - old).tobytes()


@pytest.mark.slow
def test_no_byte_of_a_private_expert_or_router_leaves(federation, monkeypatch):
    watched = Watched(monkeypatch)
    job = federation.job("private", *DEX)
    down, up = heard(job)
    rows = list(watched.rows())
    assert len({where for where, _, _ in rows}) == 3 * 2 * 2 * 5
    for where, value, update in rows:
        assert not any(found in sent for found in (value, update) for sent in (down, up)), where
    for line in lines(job.run_dir):
        assert not {EXPERTS, ROUTER} & {*line["bytes_up"], *line["bytes_down"]}
        assert not any({EXPERTS, ROUTER} & {*site["weights"]} for site in line["sites"].values())
    state = RunFolder.resume(job.run_dir).latest_state()
    assert {"backbone", "director", "head"} < set(state.groups)
    assert not {EXPERTS, ROUTER} & set(state.groups)
    assert not {EXPERTS, ROUTER} & {watched.groups[name] for name in exported(job.run_dir)}


@pytest.mark.slow
def test_what_leaves_is_to_the_bit_what_shared_parameters_moved_by(federation, monkeypatch):
    """Nothing of an expert is mixed into what is shared, where a search for its bytes would not find it."""
    watched, sent, moved = Watched(monkeypatch), [], []

    def listen(message, context):
        reply = client_app(message, context)
        if message.metadata.message_type == "train":
            (arrays,) = reply.content.array_records.values()
            sent.append({group: array.numpy().tobytes() for group, array in arrays.items()})
        return reply

    run_apps(server_app, listen, federation.job("exact", *DEX, "train.rounds=1"))
    for before, after, _ in watched.rounds.values():
        update = {name: after[name] - before[name] for name in after if watched.groups[name] not in (EXPERTS, ROUTER)}
        packed = GroupManifest.of(watched.groups, update).pack_all(update)
        moved.append({group: flat.tobytes() for group, flat in packed.items()})
    assert len(sent) == len(moved) == len(SITES)
    assert all(each in moved for each in sent)


@pytest.mark.parametrize("rule", quick([POOLED, NAIVE], 1))
def test_shared_experts_travel(federation, monkeypatch, rule):
    """The negative control of the test above: here the same search finds every update."""
    watched = Watched(monkeypatch)
    job = federation.job("shared", *DEX, rule)
    _, up = heard(job)
    assert all(update in up for _, _, update in watched.rows())
    assert {EXPERTS, ROUTER} < {watched.groups[name] for name in exported(job.run_dir)}


def test_pooled_experts_weigh_as_their_gate_mass(federation, monkeypatch):
    watched = Watched(monkeypatch)
    run_dir = federation.run("pooled", *DEX, POOLED, "train.rounds=1")
    weights = {site: line["weights"] for site, line in lines(run_dir)[0]["sites"].items()}
    images = {"alpha": 6.0, "beta": 6.0, "gamma": 6.0}
    for site, found in weights.items():
        assert sum(found[EXPERTS][:3]) == pytest.approx(images[site], rel=1e-5)
        assert sum(found[EXPERTS][3:]) == pytest.approx(images[site], rel=1e-5)
        assert found[ROUTER] == found[EXPERTS]
        assert found[DIRECTOR] == pytest.approx([2 * images[site]], rel=1e-5)
    tensors, name = exported(run_dir), "backbone.blocks.0.mlp.experts.weight_in"
    for expert in range(3):
        total = sum(weights[site][EXPERTS][expert] for site in SITES)
        before = watched.rounds["alpha", 1][0][name][expert]
        if total == 0.0:
            assert tensors[name][expert].tobytes() == before.tobytes()
            continue
        moved = sum(
            weights[site][EXPERTS][expert] * (watched.rounds[site, 1][1][name][expert].astype(np.float64) - before)
            for site in SITES
        )
        np.testing.assert_allclose(tensors[name][expert] - before, moved / total, atol=1e-7)


@pytest.mark.slow
def test_the_next_local_average_goes_on_from_the_federated_director(federation, monkeypatch):
    """Round 2 at a site: director = m federated + (1 - m) sum of share x its own expert, which it kept."""
    watched = Watched(monkeypatch)
    job = federation.job("rebased", *DEX, "train.local-steps=1", "model.experts.director-momentum=[0.75, 0.75]")
    federated = {}

    def listen(message, context):
        if message.metadata.message_type == "train":
            federated[message.metadata.group_id] = message.content.array_records["arrays"][DIRECTOR].numpy().copy()
        return client_app(message, context)

    run_apps(server_app, listen, job)
    names = sorted(name for name in watched.rounds["alpha", 1][0] if watched.groups[name] == DIRECTOR)
    for site in SITES:
        before, after, result = watched.rounds[site, 2]
        assert np.concatenate([before[name].ravel() for name in names]).tobytes() == federated["2"].tobytes()
        own = watched.rounds[site, 1][1]
        assert all(np.array_equal(before[name], own[name]) for name in own if watched.groups[name] in (EXPERTS, ROUTER))
        assert not all(np.array_equal(before[name], own[name]) for name in names)
        for layer, mass in result.gate_mass.items():
            share = np.array(mass) / sum(mass)
            group = np.tensordot(share, after[f"{layer}.experts.weight_out"], axes=1)
            expected = 0.75 * before[f"{layer}.director.2.weight"] + 0.25 * group
            np.testing.assert_allclose(after[f"{layer}.director.2.weight"], expected, atol=1e-6)


def crash_in_round_2(message, context):
    if message.metadata.group_id == "2":
        raise KeyboardInterrupt
    return client_app(message, context)


@pytest.mark.slow
def test_a_site_that_joins_late_starts_its_experts_from_the_director(federation, monkeypatch):
    job = federation.job("late", *DEX)
    with pytest.raises(KeyboardInterrupt):
        run_apps(server_app, crash_in_round_2, job)
    run_id = RunFolder.resume(job.run_dir).latest_state().run_id
    for path in (job.run_dir / "sites" / "gamma" / "runs" / run_id).iterdir():
        path.unlink()
    client_app_forgets()
    watched = Watched(monkeypatch)
    run_local(job)
    assert lines(job.run_dir)[1]["sites"]["gamma"]["state_round"] == 0
    seeded = build_model(federation.describe(*DEX)).state_dict()
    for site in SITES:
        before, _, _ = watched.rounds[site, 2]
        for layer in ("backbone.blocks.0.mlp", "backbone.blocks.1.mlp"):
            director = before[f"{layer}.director.0.weight"]
            assert not np.array_equal(director, seeded[f"{layer}.director.0.weight"].numpy())
            copies = [np.array_equal(expert, director) for expert in before[f"{layer}.experts.weight_in"]]
            assert set(copies) == {site == "gamma"}
            router = seeded[f"{layer}.router.weight"].numpy()
            assert np.array_equal(before[f"{layer}.router.weight"], router) == (site == "gamma")


def client_app_forgets() -> None:
    """As if every site's process had ended."""
    from panfm.site import resident_site

    resident_site.cache_clear()


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["sharing.experts=private", POOLED])
def test_resuming_gives_the_bits_of_an_undisturbed_run(federation, rule):
    undisturbed = exported(federation.run("undisturbed", *DEX, rule))
    job = federation.job("killed", *DEX, rule)
    with pytest.raises(KeyboardInterrupt):
        run_apps(server_app, crash_in_round_2, job)
    client_app_forgets()
    run_local(job)
    found = exported(job.run_dir)
    assert found.keys() == undisturbed.keys()
    assert all(found[name].tobytes() == undisturbed[name].tobytes() for name in found)


@pytest.mark.slow
def test_the_exported_model_has_the_director_where_experts_are_private(federation):
    """Both paths through it are the director's."""
    run_dir = federation.run("exported", *DEX)
    model, run = load_model(run_dir / "model")
    store = open_store(federation.sites / "alpha", run.streams)
    with torch.inference_mode():
        batch = store.batch(store.indices("train"))
        torch.testing.assert_close(model.embed(batch), model.embed(batch, route="director"), atol=1e-5, rtol=1e-5)
    assert np.isfinite(embed_store(model, store, store.indices("train"))).all()


def test_private_experts_live_in_the_sites_state(federation):
    run_dir = federation.run("kept", *DEX)
    run_id = RunFolder.resume(run_dir).latest_state().run_id
    name = "student.backbone.blocks.0.mlp.experts.weight_in"
    kept = {(site, n): StateStore(run_dir / "sites" / site, run_id).load(n)[name] for site in SITES for n in (1, 2)}
    assert all(not torch.equal(kept[one], kept[two]) for one in kept for two in kept if one != two)
