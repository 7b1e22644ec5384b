"""A server that chooses description and parameters against a patient: the sum moves by the clip norm, no more."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Literal

import numpy as np
import pytest
import torch

from panfm.config import dump_toml, parse_run
from panfm.config.base import Config
from panfm.config.objective import ObjectiveConfig
from panfm.errors import ConfigError, ProtocolError
from panfm.models import build_model
from panfm.models.vit import VisionTransformer
from panfm.privacy.guarantees import NO_CLAIM, broken_guarantees, checked_run, claim
from panfm.privacy.patient_sums import saliency_sum
from panfm.privacy.private_step import clipped_sum
from panfm.registry import BACKBONES, MASKING_POLICIES, OBJECTIVES
from panfm.sharing.coding import digests, take_step
from panfm.sharing.groups import GroupManifest
from panfm.sharing.messages import RoundTask
from panfm.site import Site
from panfm.training.objectives.mae.config import MaeConfig
from panfm.training.policies import SaliencyPolicy
from panfm.training.token_mask import TokenMask, build_policy
from panfm.training.trainer import Trainer
from simulations.cohorts.prepare import cohort_folder
from strategies.group_means import GroupSetup, make_mean
from strategies.round_messages import code_step
from tests.attacks.private_steps import (
    LEVEL,
    PRIVACY,
    RANDOM,
    RUN,
    decided_by_rounding,
    ill_conditioned,
    largest_change,
    norm,
    private_run,
    trainer_and_features,
)

EVERYTHING = [[True, True]] * 5
KINDS = [(objective, backbone) for objective in ("latent", "mae") for backbone in ("dense", "dex")]
_FIRST, _REST = slice(1), slice(1, None)


def every_second_hidden(trainer, features, full, relative, number, generator):
    layout = trainer.model.layout(features)
    return TokenMask.of(layout, (layout.patch_index % 2 == 1) & layout.valid)


def test_a_loss_that_is_scaled_to_nothing_does_not_switch_clipping_off(monkeypatch):
    """The server sends `beta = 1e26` and `clip-norm = 1e-30`, past the check of the ranges."""
    monkeypatch.setattr(Trainer, "mask", every_second_hidden)
    run = private_run()
    changes = {
        "objective": run.objective.model_copy(update={"beta": 1e26}),
        "patient_dp": run.patient_dp.model_copy(update={"clip_norm": 1e-30}),
    }
    trainer, features = trainer_and_features(run.model_copy(update=changes), EVERYTHING)
    found = largest_change(lambda indices: clipped_sum(trainer, features, indices, 0), np.arange(3))
    assert 0.9 < found / 1e-30 <= LEVEL


@pytest.mark.parametrize(
    ("table", "line"),
    [
        ("patient-dp", "clip-norm = 1e-30"),
        ("patient-dp", "clip-norm = 1e30"),
        ("patient-dp", "noise-multiplier = 0.01"),
        ("patient-dp", "statistics-noise = 0.01"),
        ("patient-dp", "sample-rate = 1e-9"),
        ("patient-dp", "delta = 0.1\npublic-subjects = 1"),
        ("patient-dp", "epsilon = 1e9"),
        ("objective", "beta = 1e26"),
        ("objective", "summary-weight = 1e30"),
        ("model", "hidden-multiple = 1000000"),
        ("model.experts", "temperature = 1e-30"),
        ("model.experts", "alignment-weight = 1e30"),
        ("model.experts", "noise = [1e30, 0.0]"),
        ("train", "learning-rate = 1e30"),
        ("train", "weight-decay = 1e30"),
        ("train", "proximal-mu = 1e30"),
        ("masking", "strength = 1e30"),
        ("masking", "limit = 1e30"),
        ("sharing.guards", "norm-limit = 1e30"),
        ("site-dp", "noise-multiplier = 0.01"),
    ],
)
def test_a_number_far_out_of_range_is_refused_by_its_key(table, line):
    """The server sends a description whose numbers were chosen to break the arithmetic."""
    keys = [each.split(" ")[0] for each in line.splitlines()]
    tables = {
        "objective": ["standardise = false"],
        "masking": ['policy = "random"'],
        "patient-dp": [each for each in PRIVACY.splitlines()[2:] if each.split(" ")[0] not in keys],
    }
    tables.setdefault(table, []).append(line)
    text = RUN + "".join(f"[{name}]\n" + "\n".join(lines) + "\n" for name, lines in tables.items())
    with pytest.raises(ConfigError, match=rf"{table}\.{keys[0]}"):
        checked_run(parse_run(text))


@pytest.mark.parametrize("objective", ["latent", "mae"])
def test_routers_that_read_rounding_errors_do_not_couple_patients(monkeypatch, objective):
    """The server sends routers for which the last bit of a patient's features decides between unlike experts. Who else
    is in the sample must not decide that bit: the sum moved by 1.9 C when the size of a batch did."""
    monkeypatch.setattr(Trainer, "mask", every_second_hidden)
    run = private_run(objective, "dex")
    for held in ([[True, True]] * 3, [[False, True]] * 3):
        trainer, features = trainer_and_features(run, held)
        for seed in range(2):
            decided_by_rounding(trainer, seed)
            found = largest_change(lambda indices, o=(trainer, features): clipped_sum(*o, indices, 0), np.arange(2))
            assert found <= LEVEL * run.patient_dp.clip_norm


@pytest.mark.parametrize(("objective", "backbone"), KINDS)
def test_a_patient_adds_the_same_bits_whoever_else_is_there(monkeypatch, objective, backbone):
    """The server sends ill-conditioned parameters. What is left of the others is the rounding of a float64 sum."""
    monkeypatch.setattr(Trainer, "mask", every_second_hidden)
    run = private_run(objective, backbone)
    trainer, features = trainer_and_features(run, [[False, True]] * 5)
    ill_conditioned(trainer)
    for size in (2, 3, 5):
        whole, rest, own = (
            clipped_sum(trainer, features, np.arange(size)[part], 0) for part in (slice(9), _REST, _FIRST)
        )
        assert norm([whole[name] - rest[name] - own[name] for name in whole]) <= 1e-14 * run.patient_dp.clip_norm


def test_a_decoder_of_nan_does_not_tell_what_others_hide(monkeypatch):
    """The server sends NaN as the decoder of one stream; whether a patient counts is decided by its own mask alone."""

    def mask(trainer, features, full, relative, number, generator):
        """Dark patients hide of the first stream, others of the second."""
        layout = trainer.model.layout(features)
        stream = trainer.model.stream_of_patch[layout.patch_index]
        dark = features.images["eye-fundus"].mean(dim=(1, 2, 3)) < features.images["eye-fundus"].new_tensor(darkest)
        return TokenMask.of(layout, (stream == (~dark[:, None]).long()) & (layout.patch_index % 2 == 1))

    run = private_run("mae")
    trainer, features = trainer_and_features(run, EVERYTHING)
    means = np.sort(features.images["eye-fundus"].mean(axis=(1, 2, 3)))
    darkest = float(means[0] + means[1]) / 2
    monkeypatch.setattr(Trainer, "mask", mask)
    with torch.no_grad():
        trainer.model.heads.streams["brain-mr"].decode.weight.fill_(float("nan"))
    found = largest_change(lambda indices: clipped_sum(trainer, features, indices, 0), np.arange(5))
    assert found <= LEVEL * run.patient_dp.clip_norm


def test_a_saliency_vector_is_of_one_patient_to_the_bit():
    """The server sends a teacher in which the last bit decides what a patient leans on."""
    guided = '[masking]\nsaliency = "attention"\n'
    trainer, features = trainer_and_features(private_run("latent", "dex", guided), EVERYTHING)
    for size in (2, 3, 5):
        decided_by_rounding(trainer, size)
        whole, rest, own = (
            saliency_sum(trainer, features, np.arange(size)[part]) for part in (slice(9), _REST, _FIRST)
        )
        assert (whole - rest).norm() <= 2**0.5 * LEVEL
        assert (whole - rest - own).norm() <= 1e-14


SITE_RUN = """
name = "small"
seed = 3
[streams]
brain-mr = { spacing-mm = [8.0, 8.0, 8.0], shape = [8, 8, 8], patch = [4, 4, 8] }
[train]
rounds = 6
local-steps = 5
"""


def round_task(extra=""):
    run = parse_run(SITE_RUN + extra)
    model = build_model(run)
    tensors = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    manifest = GroupManifest.of(model.parameter_groups(), tensors)
    return manifest, RoundTask("run-1", 1, dump_toml(run), manifest.pack_all(tensors))


@pytest.fixture
def site(tmp_path, write_site):
    return Site(write_site(tmp_path / "alpha", "alpha", ("brain",), 12))


def in_round_2(site, asked, **changes):
    """Take an honest first round, then ask for one with changes."""
    site.train_round(asked)
    groups = {group: flat.copy() for group, flat in asked.groups.items()}
    return replace(asked, round_number=2, groups=groups, **changes)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("group", ["backbone", "head", "stream:brain-mr"])
def test_a_site_refuses_global_parameters_that_are_not_finite(site, group, value):
    _, asked = round_task()
    asked = in_round_2(site, asked)
    asked.groups[group][-1] = value
    with pytest.raises(ProtocolError, match=f"^round 2: global parameters of group {group} hold NaN or infinity$"):
        site.train_round(asked)


def test_a_site_refuses_a_teacher_and_a_profile_that_are_not_finite(site):
    _, asked = round_task('teacher-start = "server-ema"\n')
    asked = in_round_2(site, replace(asked, teacher=asked.groups))
    teacher = {group: flat.copy() for group, flat in asked.groups.items()}
    teacher["head"][0] = np.nan
    with pytest.raises(ProtocolError, match=r"^round 2: teacher of group head hold NaN or infinity$"):
        site.train_round(replace(asked, teacher=teacher))
    with pytest.raises(ProtocolError, match=r"^round 2: saliency of stream brain-mr is inf, expected a finite number$"):
        site.train_round(replace(asked, profile={"brain-mr": np.inf}))


def test_a_site_refuses_a_coded_step_to_parameters_that_are_not_finite(site):
    """Two steps of 3e38: each is finite, and so is where the first leads; where the second leads is not."""
    manifest, asked = round_task('[sharing]\ncoding = "bf16"\n')
    site.train_round(asked)
    reached, step = asked.groups, np.zeros_like(asked.groups["head"])
    step[0] = 3e38
    coded, _ = code_step("bf16", manifest, "head", step, {})
    with np.errstate(over="ignore"):
        reached = take_step("bf16", manifest, reached, coded)
        site.train_round(replace(asked, round_number=2, groups=coded, digests=digests(reached)))
        reached = take_step("bf16", manifest, reached, coded)
        with pytest.raises(ProtocolError, match=r"^round 3: global parameters of group head hold NaN or infinity$"):
            site.train_round(replace(asked, round_number=3, groups=coded, digests=digests(reached)))


class UndeclaredConfig(Config):
    """An objective that somebody added and that does not say whether it couples patients."""

    name: Literal["undeclared"] = "undeclared"


@pytest.mark.parametrize("table", ["objective", "masking", "model", "train", "sharing", "federation"])
def test_a_part_that_does_not_declare_what_couples_patients_is_not_claimed_private(table):
    run = private_run().model_copy(update={table: UndeclaredConfig()})
    assert claim(private_run()) != NO_CLAIM
    assert claim(run) == NO_CLAIM
    [line] = broken_guarantees(run)
    assert line == f'{table}: "undeclared" does not declare whether it couples patients, set one that does'


class UndeclaredObjective(ObjectiveConfig):
    """A plug-in that does not say whether it couples patients."""

    implementation = "panfm.training.objectives.mae.objective:MaeObjective"
    name: Literal["undeclared"] = "undeclared"


def test_a_registered_objective_that_does_not_declare_what_couples_patients_is_refused(monkeypatch):
    """It trains; a private run of it is refused wherever its description is let in."""
    monkeypatch.setattr(OBJECTIVES, "_targets", dict(OBJECTIVES._targets))
    OBJECTIVES.register("undeclared", UndeclaredObjective)
    table = '[objective]\nname = "undeclared"\n'
    assert isinstance(parse_run(RUN + table).objective, UndeclaredObjective)
    with pytest.raises(ConfigError, match='objective: "undeclared" does not declare whether it couples patients'):
        checked_run(parse_run(RUN + table + RANDOM + PRIVACY))


class BatchNormed(VisionTransformer):
    """A backbone that couples patients, and inherits the declaration of one that does not."""


class Accumulating(SaliencyPolicy):
    """A policy that adds up what it sees of patients, and inherits the declaration of one that does not."""


class InheritedObjective(MaeConfig):
    """An objective that inherits the declaration of another."""

    name: Literal["inherited"] = "inherited"


@pytest.mark.parametrize(
    ("table", "plug_in", "key"),
    [
        (BACKBONES, BatchNormed, "model.backbone"),
        (MASKING_POLICIES, Accumulating, "masking.policy"),
        (OBJECTIVES, InheritedObjective, "objective.name"),
    ],
)
def test_a_declaration_of_what_couples_patients_is_not_inherited(monkeypatch, table, plug_in, key):
    monkeypatch.setattr(table, "_targets", dict(table._targets))
    table.register("inherited", plug_in)
    part, option = key.split(".")
    masking = "" if part == "masking" else RANDOM
    objective = "" if part == "objective" else '[objective]\nname = "mae"\n'
    text = RUN + objective + masking + f'[{part}]\n{option} = "inherited"\n'
    if part == "masking":
        text += 'saliency = "attention"\n'
    checked_run(parse_run(text))
    with pytest.raises(ConfigError, match=r"inherited.* does not declare whether it couples patients"):
        checked_run(parse_run(text + PRIVACY))


class Buffered(VisionTransformer):
    """A backbone that claims to couple nobody, and keeps a running mean of patients that would be sent."""

    couplings = staticmethod(VisionTransformer.couplings)

    def __init__(self, *args):
        super().__init__(*args)
        self.register_buffer("running_mean", torch.zeros(3))


def test_numbers_that_never_get_noise_are_refused_in_a_private_model(monkeypatch):
    monkeypatch.setattr(BACKBONES, "_targets", dict(BACKBONES._targets))
    BACKBONES.register("buffered", Buffered)
    run = private_run("mae", extra='[model]\nbackbone = "buffered"\n')
    with pytest.raises(ConfigError, match=r"backbone\.running_mean is a buffer"):
        Trainer(run)


def test_a_stream_that_does_not_declare_what_couples_patients_is_not_claimed_private():
    run = private_run().model_copy(update={"streams": {"brain-mr": UndeclaredConfig()}})
    [line] = broken_guarantees(run)
    assert line.startswith('streams.brain-mr: "undeclared" does not declare')


def test_names_that_nobody_knows_are_not_taken_for_others(make_run):
    run = make_run()
    masking = run.masking.model_copy(update={"policy": "unknown"})
    trainer = Trainer(run)
    with pytest.raises(ConfigError, match="'unknown', expected one of random"):
        build_policy(masking, ("brain", "heart", "eye"))
    with pytest.raises(ConfigError, match="'unknown', expected one of random"):
        list(masking.couplings())
    with pytest.raises(ConfigError, match="'unknown', expected one of random"):
        Trainer(run.model_copy(update={"masking": masking}))
    trainer.run = run.model_copy(update={"objective": UndeclaredConfig()})
    with pytest.raises(AttributeError, match="implementation"):
        trainer.reset_private()
    sharing = SimpleNamespace(**dict(run.sharing), mean_of=lambda group: "unknown", optimiser_of=None)
    with pytest.raises(ConfigError, match="mean: found 'unknown'"):
        make_mean(sharing, "backbone", GroupSetup(((1, 0),), 1.0))


def test_a_cohort_that_nobody_knows_is_not_taken_for_another():
    run = private_run().model_copy(update={"cohort": {"kind": "undeclared"}})
    with pytest.raises(ConfigError, match=r"cohort\.kind: found 'undeclared', expected one of phantom, "):
        cohort_folder(run)
