"""Noise makes a private site's honest reply look like one that the server refuses: then the run stops, paid for."""

from statistics import median
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from panfm.config import parse_run
from panfm.config.base import LEAST_NOISE
from panfm.models import build_model
from panfm.privacy import patient_sums
from panfm.privacy.patient_sums import noisy_profile
from panfm.sharing.groups import GroupManifest
from panfm.sharing.messages import Handshake, RoundReply
from panfm.sharing.weights import GroupWeights, Trained
from panfm.training.trainer import Trainer
from strategies.exact_mean import ExactMean
from strategies.reply_guards import LIMIT, Directions, check_reply
from strategies.server_step import Memory
from tests.cases import quick
from tests.unit.site.test_private_site import DEX, GUIDED, PRIVACY, RUN

NOISES = (LEAST_NOISE, 20.0, 1e4)
"""Smallest, default and largest."""


def patients(random, num_patients: int, num_streams: int) -> torch.Tensor:
    """Sum of shares and equal splits [2, S] of patients who each hold some of the streams and lean on one of them."""
    present = random.random((num_patients, num_streams)) < 0.5
    present[np.arange(num_patients), random.integers(0, num_streams, num_patients)] = True
    shares = np.where(present, random.random((num_patients, num_streams)) ** 8 + 1e-9, 0.0)
    shares /= shares.sum(axis=1, keepdims=True)
    return torch.tensor(np.stack([shares.sum(axis=0), (present / present.sum(axis=1, keepdims=True)).sum(axis=0)]))


def trainer_of(num_streams: int, noise: float) -> tuple[SimpleNamespace, SimpleNamespace]:
    """A trainer and a store with only the parts that a profile reads."""
    names = [f"organ{index}-mr" for index in range(num_streams)]
    run = SimpleNamespace(patient_dp=SimpleNamespace(statistics_noise=noise))
    model = SimpleNamespace(stream_names=names)
    return SimpleNamespace(run=run, model=model, device="cpu"), SimpleNamespace(images=dict.fromkeys(names))


def check(profile: torch.Tensor, names: list[str]) -> None:
    """The server's guard on a reply with this saliency."""
    handshake = Handshake("alpha", 40, dict.fromkeys(names, 40), {}, "", {"backbone": ""})
    told = dict(zip(names, profile.tolist(), strict=True))
    reply = RoundReply("run-1", 1, 0, {"backbone": np.zeros(1, np.float32)}, {"backbone": (1.0,)}, saliency=told)
    check_reply(reply, handshake, {"backbone": (1.0,)}, of=("run-1", 1))


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("num_streams", quick(range(1, 8), [1, 7]))
def test_no_draw_of_noise_has_a_saliency_refused(monkeypatch, num_streams, noise):
    """With one stream and the default noise one round in ten was. Cut at the site, it lies in range in every draw."""
    random = np.random.default_rng(num_streams)
    trainer, store = trainer_of(num_streams, noise)
    for num_patients in (1, 10, 100, 1000):
        total = patients(random, num_patients, num_streams)
        monkeypatch.setattr(patient_sums, "saliency_sum", lambda *_, total=total: total)
        for _ in range(150):
            profile = noisy_profile(trainer, store, np.arange(num_patients))
            assert profile.min() > 0.0
            assert profile.max() <= num_streams
            check(profile, trainer.model.stream_names)


def test_a_profile_without_much_noise_is_the_true_one(monkeypatch):
    """The control: cutting takes nothing from an estimate that needs no cut."""
    total = patients(np.random.default_rng(0), 1000, 5)
    monkeypatch.setattr(patient_sums, "saliency_sum", lambda *_: total)
    profile = noisy_profile(*trainer_of(5, LEAST_NOISE), np.arange(1000))
    torch.testing.assert_close(profile.double(), total[0] / total[1], rtol=0.05, atol=0.0)


@pytest.mark.parametrize(
    "privacy", [PRIVACY, PRIVACY.replace("= 0.5", "= 1.0"), PRIVACY.replace("= 40", "= 1000").replace("1e-3", "1e-4")]
)
@pytest.mark.parametrize("extra", ["", DEX])
def test_the_weights_of_a_private_site_do_not_depend_on_noise(privacy, extra):
    """They are public numbers, and within what the server lets a site of that size weigh."""
    run = parse_run(RUN + GUIDED + extra + privacy)
    model = build_model(run)
    manifest = GroupManifest.of(model.parameter_groups(), model.state_dict())
    subjects, steps = run.patient_dp.public_subjects, run.train.local_steps
    images = min(run.patient_dp.sample_rate * subjects, subjects, run.train.batch_size) * steps
    layers = {name: run.model.experts.count[0] for name, _ in manifest.groups.get("director", ())}
    masses = {name.rpartition(".director.")[0]: [images / count] * count for name, count in layers.items()}
    streams = dict.fromkeys(run.streams, subjects)
    weights = GroupWeights(run.sharing, run.train, run.site_dp, manifest)
    for group in manifest.groups:
        found = weights.weights(group, Trained(subjects, streams, steps, masses))
        limits = weights.limits(group, subjects=subjects, subjects_per_stream=streams)
        assert all(0.0 < weight <= limit for weight, limit in zip(found, limits, strict=True)), group


ROUNDS, STEPS = 10, 5
NOISE_ONLY = RUN.replace("rounds = 6", f"rounds = {ROUNDS}").replace("local-steps = 2", f"local-steps = {STEPS}")


def lengths_of_noise(deviation: float, seed: int) -> list[dict[str, float]]:
    """Root mean square per group of each round's update, in learning rates x local steps, of one site whose gradients
    are nothing but noise."""
    run = parse_run(NOISE_ONLY + GUIDED + PRIVACY)
    trainer = Trainer(run)
    manifest = GroupManifest.of(trainer.model.parameter_groups(), trainer.shared_state())
    random, rounds = torch.Generator().manual_seed(seed), []
    for number in range(ROUNDS):
        before = trainer.shared_state()
        for taken in range(STEPS):
            parameters = trainer.model.named_parameters()
            gradient = {name: deviation * torch.randn(value.shape, generator=random) for name, value in parameters}
            trainer.set_gradient(gradient)
            trainer.update(trainer.progress(number * STEPS + taken))
        moved = {name: (value - before[name]).numpy() for name, value in trainer.shared_state().items()}
        scale = run.train.learning_rate * STEPS
        rounds.append(
            {group: float(np.sqrt(np.square(flat).mean())) / scale for group, flat in manifest.pack_all(moved).items()}
        )
    return rounds


@pytest.mark.slow
@pytest.mark.parametrize(("noise", "clip", "subjects"), [(1.5, 1.0, 40), (LEAST_NOISE, 1e-3, 1000), (1e4, 1e3, 1)])
def test_updates_of_noise_are_no_longer_than_the_norm_guards_allow(noise, clip, subjects):
    """AdamW moves a number by less than a learning rate a step, whatever the noise. Two sites differ by a tenth at most
    in a round; a round is at most 2.1 times as long as those before it, while the learning rate warms up."""
    deviation = noise * clip / subjects
    sites = [lengths_of_noise(deviation, seed) for seed in range(3)]
    for group in sites[0][0]:
        past: list[float] = []
        for number in range(ROUNDS):
            lengths = [rounds[number][group] for rounds in sites]
            assert max(lengths) < 1.0
            assert max(lengths) < 1.25 * min(lengths)
            assert max(lengths) < 2.5 * median(past or lengths)
            past.append(median(lengths))


@pytest.mark.slow
def test_updates_of_noise_do_not_point_elsewhere():
    """Cosines of updates of noise with the votes of a round before lie within a few 1 / sqrt(numbers) of 0."""
    random, size = np.random.default_rng(0), 1000
    for num_sites in (4, 5, 9):
        memory = Memory()
        for _ in range(30):
            directions = Directions(LIMIT, memory)
            votes = directions.votes("backbone", size, num_sites)
            mean = ExactMean(((size, 0),), weight_limit=num_sites, votes=votes)
            for index in range(num_sites):
                norm = mean.add(0.01 * random.standard_normal(size).astype(np.float32), (1.0,))
                cosines = {"backbone": directions.cosine("backbone", norm)}
                directions.check(f"site{index}", cosines)
                directions.accept(f"site{index}", cosines)
            memory = Memory()
            directions.remember(memory)
        assert all(abs(cosine) < 0.2 for cosine in memory.cosines["backbone"].values())
