"""Shared by attacks on the private step: a private run, hostile parameters, and how far one patient moves a sum."""

import numpy as np
import torch

from panfm.config import parse_run
from panfm.data.store import ImageStore
from panfm.privacy.private_step import clipped_sum
from panfm.training.trainer import Trainer

LEVEL = 1 + 1e-5
RUN = """
name = "attacked"
organs = ["brain", "eye"]
streams.brain-mr = { spacing-mm = [2.0, 2.0, 2.0], shape = [12, 8, 4], patch = [4, 4, 4] }
streams.eye-fundus = { shape = [20, 12], patch = [4, 4], channels = 3 }
"""
PRIVACY = """
[patient-dp]
epsilon = 8.0
delta = 1e-3
public-subjects = 50
noise-multiplier = 1.0
sample-rate = 0.25
"""
RANDOM = '[masking]\npolicy = "random"\n'
OBJECTIVES = {
    "latent": '[objective]\nname = "latent"\nstandardise = false\n',
    "mae": '[objective]\nname = "mae"\n',
}
BACKBONES = {
    "dense": "",
    "dex": '[model]\nbackbone = "director-experts"\nhidden-multiple = 2\n'
    "[model.experts]\ncount = 4\nactive = 2\nnoise = [0.0, 0.0]\nbalance-weight = [0.0, 0.0]\n",
}


def private_run(objective="latent", backbone="dense", masking=RANDOM, extra=""):
    return parse_run(RUN + OBJECTIVES[objective] + BACKBONES[backbone] + masking + PRIVACY + extra)


def random_store(run, held, seed=0):
    """Subjects that hold the streams marked in `held`, bool [subjects, streams], with images of noise."""
    random, held = np.random.default_rng(seed), np.asarray(held, dtype=bool)
    images, rows = {}, {}
    for column, (name, stream) in enumerate(run.streams.items()):
        if held[:, column].any():
            rows[name] = np.flatnonzero(held[:, column])
            images[name] = random.random((len(rows[name]), stream.channels, *stream.shape), dtype=np.float32)
    names = tuple(f"s{number}" for number in range(len(held)))
    return ImageStore(names, ("train",) * len(held), images, rows)


def norm(tensors):
    return torch.stack([value.double().square().sum() for value in tensors]).sum().sqrt().item()


def largest_change(summed, indices, leaving=None):
    """How far a sum moves, at most, when one of the indices goes."""
    whole = summed(indices)
    rests = [summed(np.delete(indices, each)) for each in (range(len(indices)) if leaving is None else leaving)]
    return max(norm([whole[name] - rest[name] for name in whole]) for rest in rests)


def ill_conditioned(trainer, seed=0, scale=3.0):
    """Parameters with which the last bit of an image decides what the model does."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in (*trainer.model.parameters(), *trainer.teacher.parameters()):
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))


def _signs(shape, generator):
    return torch.randint(0, 2, shape, generator=generator) * 2.0 - 1.0


def _magnitudes(shape, generator):
    """From 1e-38 to 1e38, of either sign."""
    exponents = torch.rand(shape, generator=generator) * 76.0 - 38.0
    return (10.0 ** exponents.double()).clamp(max=3e38).float() * _signs(shape, generator)


def _with_one(value):
    def put(parameter, generator):
        parameter.view(-1)[int(torch.randint(parameter.numel(), (), generator=generator))] = value

    return put


HOSTILE = {
    "one NaN": _with_one(float("nan")),
    "one inf": _with_one(float("inf")),
    "NaN": lambda p, g: p.fill_(float("nan")),
    "-inf": lambda p, g: p.fill_(float("-inf")),
    "1e38": lambda p, g: p.copy_(1e38 * _signs(p.shape, g)),
    "1e-38": lambda p, g: p.copy_(1e-38 * _signs(p.shape, g)),
    "1e15 times": lambda p, g: p.mul_(1e15),
    "1e-15 times": lambda p, g: p.mul_(1e-15),
    "all magnitudes": lambda p, g: p.copy_(_magnitudes(p.shape, g)),
    "zero": lambda p, g: p.zero_(),
    "signs": lambda p, g: p.copy_(_signs(p.shape, g)),
    "chaotic": lambda p, g: p.add_(3.0 * torch.randn(p.shape, generator=g)),
}
"""Name -> what is done to a parameter."""


@torch.no_grad()
def poison(trainer, kind, seed, share=1.0):
    """Put hostile numbers into a share of the parameters of student and teacher, chosen at random."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in (*trainer.model.parameters(), *trainer.teacher.parameters()):
        if torch.rand((), generator=generator) < share:
            HOSTILE[kind](parameter, generator)


def fixed_draws(index):
    """A patient's own generator, the same whoever else is there."""
    return torch.Generator().manual_seed(1000 + index)


def trainer_and_maps(run, held, seed=0):
    store = random_store(run, held, seed)
    trainer = Trainer(run, list(store.images))
    return trainer, trainer.stem(store)


def summed(trainer, store, profile=None):
    return lambda indices: clipped_sum(trainer, store, indices, 0, profile, fixed_draws)


@torch.no_grad()
def decided_by_rounding(trainer, seed=0):
    """Routers that read the mean of what a norm has centred: rounding errors alone decide which experts a patient uses,
    and the two sets of experts have nothing in common."""
    generator = torch.Generator().manual_seed(seed)
    layers = [*trainer.model.director_experts().values(), *trainer.teacher.director_experts().values()]
    for layer in layers:
        layer.router.weight.copy_(1e6 * torch.tensor([1.0, -1.0, 1.0, -1.0])[:, None])
        for parameter in layer.experts.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator))
