"""Memory, seconds and bytes of a run, from one step that is tried on random images of its shapes."""

import time
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from panfm.config import RunConfig
from panfm.data.store import ImageStore
from panfm.models import describe_model
from panfm.models.packing import trained_manifest
from panfm.models.sizes import sizes_of
from panfm.planning.run_cost import bytes_up, round_seconds
from panfm.seeds import numpy_generator
from panfm.training.trainer import Trainer

_STEPS = 2
"""Steps that are timed; one before them makes everything warm."""


@dataclass(frozen=True)
class Cost:
    """Cost of a run on this machine."""

    step_seconds: float
    """One local step at the site with the most streams."""
    round_seconds: float
    """A round of all sites, one after the other."""
    memory_gib: float
    """Of one step, at most, beside images and libraries."""
    parameters: int
    bytes_up: int
    """That all sites send in a round."""


def measure_cost(run: RunConfig, holders: Mapping[str, Mapping[str, float]]) -> Cost:
    """Train a few steps on random images, and count the rest.

    Args:
        holders: Site -> stream -> share of its training subjects who have it.
    """
    fullest = max(holders.values(), key=len)
    seconds = _step_seconds(run, fullest)
    sizes, manifest = sizes_of(run), trained_manifest(describe_model(run), run.sharing)
    sent = bytes_up({group: manifest.size(group) for group in manifest.groups}, holders)
    return Cost(
        step_seconds=seconds,
        round_seconds=round_seconds(seconds, run.train.local_steps, sites_in_turn=len(holders)),
        memory_gib=sizes.step_bytes / 2**30,
        parameters=sizes.parameters,
        bytes_up=sum(sent.values()),
    )


def _step_seconds(run: RunConfig, shares: Mapping[str, float]) -> float:
    store = _random_store(run, shares)
    trainer, everyone = Trainer(run, tuple(shares)), store.indices("train")
    trainer.train(store, everyone, first_step=0, num_steps=1, site="plan", round_number=1)
    start = time.perf_counter()
    trainer.train(store, everyone, first_step=1, num_steps=_STEPS, site="plan", round_number=1)
    return (time.perf_counter() - start) / _STEPS


def _random_store(run: RunConfig, shares: Mapping[str, float]) -> ImageStore:
    """A batch of subjects with random images, as many of each stream as at the site."""
    generator, number = numpy_generator(run.seed, "plan"), run.train.batch_size
    images, rows = {}, {}
    for name, share in shares.items():
        stream = run.streams[name]
        rows[name] = np.arange(max(2, round(share * number)) if number > 1 else 1)
        shape = (len(rows[name]), stream.channels, *stream.shape)
        images[name] = generator.random(shape, dtype=np.float32)
    subjects = tuple(f"random-{index}" for index in range(max(number, *map(len, rows.values()))))
    return ImageStore(subjects, ("train",) * len(subjects), images, rows)
