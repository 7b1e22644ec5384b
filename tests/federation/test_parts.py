"""Federations that train a part: the rest travels once, keeps its bits, and is refused if it is another's."""

import json
import shutil

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch

from panfm.config import dump_toml
from panfm.config.start import StartConfig
from panfm.errors import DataError, ProtocolError
from panfm.models import build_model
from panfm.models.warm_start import start_model
from panfm.sharing.groups import parameter_hashes
from panfm.sharing.messages import RoundTask, frozen_name
from panfm.site.site import Site
from server.rounds import frozen_groups, initial_state
from server.run_folder import RunFolder
from simulations.engines.local import run as run_local
from tests.unit.models.test_public_weights import random_dinov2

LAST = 'train.parts={ kind = "last-blocks", blocks = 1 }'


def tensors(run_dir):
    return safetensors.numpy.load((run_dir / "model" / "model.safetensors").read_bytes())


def rounds(run_dir):
    return [json.loads(line) for line in (run_dir / "rounds.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_what_is_not_trained_travels_once_and_keeps_its_bits(federation):
    folder = federation.run("parts", LAST)
    run = RunFolder.resume(folder).run
    model, after = build_model(run), tensors(folder)
    assert after.keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert np.array_equal(after[name], value) == (name not in model.trained), name
    lines = rounds(folder)
    assert all(len(line["sites"]) == 3 and not line["rejected"] for line in lines)
    groups, frozen = initial_state(run)[0].groups, frozen_groups(run)
    for line in lines:
        for group, flat in groups.items():
            sites = len(line["coverage"][group.removeprefix("stream:")]) if ":" in group else 3
            once = frozen[group].nbytes if group in frozen and line["round"] == 1 else 0
            assert line["bytes_up"][group] == sites * flat.nbytes
            assert line["bytes_down"][group] == sites * (flat.nbytes + once)


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), ("sharing.coding=int8", "train.teacher-start=server-ema")])
def test_a_run_that_was_killed_goes_on_with_the_same_bits(federation, more):
    expected = tensors(federation.run("whole", LAST, *more))
    job = federation.job("killed", LAST, *more)
    run_local(job)
    shutil.rmtree(job.run_dir / "model")
    newest = job.run_dir / "checkpoint" / "round-000003.state"
    newest.unlink()
    RunFolder.resume(job.run_dir)
    run_local(job)
    assert all(np.array_equal(value, expected[name]) for name, value in tensors(job.run_dir).items())


@pytest.fixture
def asked(federation):
    """A site, and what asks it for a round."""
    run = federation.describe(LAST)
    groups, frozen = initial_state(run)[0].groups, frozen_groups(run)
    mine = [group for group in groups if group not in ("stream:liver-mr",)]

    def ask(number, frozen=frozen, groups=groups):
        kept = {group: frozen[group] for group in mine if group in frozen}
        return RoundTask("run-1", number, dump_toml(run), {group: groups[group] for group in mine}, frozen=kept)

    return Site(federation.sites / "alpha"), ask


def test_a_site_that_lost_what_is_frozen_says_so_and_gets_it_again(asked, federation):
    site, ask = asked
    site.train_round(ask(1))
    [kept] = site.state_dir.glob("runs/run-1/frozen.safetensors")
    again = Site(federation.sites / "alpha")
    assert again.train_round(ask(2, frozen={})).updates.keys() == ask(2).groups.keys()
    content = kept.read_bytes()
    kept.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    _forget(federation)
    with pytest.raises(DataError, match=r"frozen\.safetensors"):
        Site(federation.sites / "alpha").train_round(ask(3, frozen={}))
    kept.unlink()
    with pytest.raises(ProtocolError, match=r"^round 3: this site lacks the parameters that are not trained$"):
        Site(federation.sites / "alpha").train_round(ask(3, frozen={}))
    Site(federation.sites / "alpha").train_round(ask(3))
    assert kept.exists()


def _forget(federation):
    """Let go of the trainers of this process, as a restart does."""
    from panfm.site.session import _trainers

    _trainers.cache_clear()


@pytest.mark.parametrize("number", [1, 2])
def test_other_parts_than_the_runs_are_refused(asked, number):
    site, ask = asked
    if number == 2:
        site.train_round(ask(1))
    frozen, groups = dict(ask(number).frozen), dict(ask(number).groups)
    moved = frozen | {"backbone": frozen["backbone"] + np.float32(1e-3)}
    with pytest.raises(ProtocolError, match=rf"^round {number}: backbone/frozen is not what the run's seed gives"):
        site.train_round(ask(number, frozen=moved))
    with pytest.raises(ProtocolError, match="missing group"):
        site.train_round(ask(number, frozen={"backbone": frozen["backbone"]}))
    whole = np.concatenate([groups["backbone"], frozen["backbone"]])
    with pytest.raises(ProtocolError, match=r"^backbone: got float32"):
        site.train_round(ask(number, groups=groups | {"backbone": whole, "stream:liver-mr": whole}))


def test_parts_that_are_not_finite_are_refused_though_the_run_names_them(federation):
    run = federation.describe(LAST)
    groups = {name: flat for name, flat in initial_state(run)[0].groups.items() if name != "stream:liver-mr"}
    frozen = {name: flat for name, flat in frozen_groups(run).items() if name != "stream:liver-mr"}
    frozen["backbone"] = np.full_like(frozen["backbone"], np.nan)
    hashes = parameter_hashes(groups) | {frozen_name(name): one for name, one in parameter_hashes(frozen).items()}
    run = run.model_copy(update={"start": StartConfig(parameters=hashes)})
    with pytest.raises(ProtocolError, match=r"^round 1: global parameters of group backbone hold NaN or infinity$"):
        Site(federation.sites / "alpha").train_round(RoundTask("run-1", 1, dump_toml(run), groups, frozen=frozen))


@pytest.mark.slow
def test_a_public_start_reaches_the_sites_and_its_additions_the_next_run(federation):
    """Volumes from an RGB kernel of another patch, LoRA on frozen blocks; then a run that has them in its weights."""
    public = federation.folder / "w.safetensors"
    safetensors.torch.save_file(random_dinov2(), public)
    model = ("model.tokenizer=patch", "model.positions=learned", "model.layer-scale=true", "train.rounds=2")
    lora = 'train.parts={ kind = "lora", rank = 2, blocks = 1 }'
    folder = federation.run("public", f"start.model={public}", "start.inflate=mean", lora, *model)
    run = RunFolder.resume(folder).run
    started, after = start_model(run).state_dict(), tensors(folder)
    assert all(len(line["sites"]) == 3 for line in rounds(folder))
    trained = build_model(run).trained
    assert all(np.array_equal(value, started[name]) == (name not in trained) for name, value in after.items())
    assert np.array_equal(after["backbone.blocks.0.mlp.0.weight"], random_dinov2()["blocks.0.mlp.fc1.weight"])
    assert run.start.parameters.keys() >= {"backbone", "backbone/frozen"}
    merged = tensors(federation.run("next", f"start.model={folder}/model", *model, "train.learning-rate=1e-9"))
    name = "backbone.blocks.1.attention.out"
    assert f"{name}.lora_a" not in merged
    wanted = after[f"{name}.weight"] + after[f"{name}.lora_b"] @ after[f"{name}.lora_a"]
    np.testing.assert_allclose(merged[f"{name}.weight"], wanted, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("experts", ["private", "pooled"])
def test_directors_and_experts_that_are_not_trained_keep_their_bits(federation, experts):
    dex = ("model.backbone=director-experts", "model.experts.count=2", "model.experts.active=1")
    folder = federation.run("dex", "train.parts=norms", *dex, f"sharing.experts={experts}", "train.rounds=2")
    run = RunFolder.resume(folder).run
    model, after = build_model(run), tensors(folder)
    assert all(len(line["sites"]) == 3 for line in rounds(folder))
    for name, value in after.items():
        assert np.array_equal(value, model.state_dict()[name]) == (name not in model.trained), name
    assert any(".director." in name for name in after)
    assert any(".experts." in name for name in after) == (experts == "pooled")
    trained = federation.run("last", LAST, *dex, f"sharing.experts={experts}", "train.rounds=2")
    moved = {name for name, value in tensors(trained).items() if not np.array_equal(value, model.state_dict()[name])}
    assert {name.split(".")[2] for name in moved if ".director." in name} == {"1"}
