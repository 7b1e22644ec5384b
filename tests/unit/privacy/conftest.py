"""Private runs, a store with every subset of three streams, and masks that depend on the patient alone."""

import itertools

import numpy as np
import pytest

from panfm.data.store import ImageStore
from panfm.training.token_mask import TokenMask
from panfm.training.trainer import Trainer

PRIVATE = """
[patient-dp]
epsilon = 8.0
delta = 1e-3
public-subjects = 50
noise-multiplier = 1.0
sample-rate = 0.25
clip-norm = {clip}
{more}
[masking]
policy = "random"
"""
OBJECTIVES = {
    "latent": '[objective]\nname = "latent"\nstandardise = false\n',
    "mae": '[objective]\nname = "mae"\n',
}
BACKBONES = {
    "dense": "",
    "dex": '[model]\nbackbone = "director-experts"\nhidden-multiple = 2\n'
    "[model.experts]\ncount = 4\nactive = 2\nnoise = [0.0, 0.0]\nbalance-weight = [0.0, 0.0]\n",
}


@pytest.fixture
def make_private(make_run):
    """A private run: objective and backbone by name, more keys of `[patient-dp]`."""

    def make(objective="latent", backbone="dense", *, clip=0.5, more="", extra=""):
        tables = OBJECTIVES.get(objective, objective) + BACKBONES[backbone] + extra
        return make_run(tables + PRIVATE.format(clip=clip, more=more))

    return make


@pytest.fixture
def every_subset(make_store):
    """Subjects for each non-empty subset of the run's three streams, unsorted."""

    def make(run, copies=2):
        complete = make_store(run, 7 * copies, complete=True)
        kinds = [kind for kind in itertools.product([False, True], repeat=3) if any(kind)] * copies
        images, rows = {}, {}
        for column, name in enumerate(run.streams):
            rows[name] = np.flatnonzero([kind[column] for kind in kinds])
            images[name] = complete.images[name][rows[name]]
        return ImageStore(complete.subjects, complete.splits, images, rows)

    return make


@pytest.fixture
def fixed_masks(monkeypatch):
    """Every second place is hidden: a patient's mask is the same whoever else is in the batch."""

    def mask(trainer, maps, full, relative, number, generator):
        layout = trainer.model.layout(maps)
        return TokenMask.of(layout, (layout.place % 2 == 1) & layout.valid)

    monkeypatch.setattr(Trainer, "mask", mask)
    return mask
