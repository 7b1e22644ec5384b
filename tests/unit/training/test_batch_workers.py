"""Batches that threads prepare ahead: the same update, one error, and memory that does not grow with the patients."""

import resource
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from panfm.config import parse_run
from panfm.data.store import ImageStore
from panfm.training import feature_store
from panfm.training.trainer import Trainer

AUGMENT = "[augment]\n"
TURNS = '[objective]\nname = "views"\npairs = true\n[augment]\n'
STEPS = 5


def train(run, store, workers, round_number=1):
    trainer = Trainer(run)
    everyone = np.arange(len(store.subjects))
    steps = {"first_step": 0, "num_steps": STEPS, "site": "a", "round_number": round_number}
    result = trainer.train(store, everyone, **steps, workers=workers)
    return trainer.shared_state() | trainer.private_state(), result


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def with_sessions(store):
    """The same patients, each with two images of every stream."""
    images = {name: np.concatenate([image, 1 - image]) for name, image in store.images.items()}
    order = {name: np.argsort(np.tile(rows, 2), kind="stable") for name, rows in store.rows.items()}
    rows = {name: np.tile(rows, 2)[order[name]] for name, rows in store.rows.items()}
    return replace(store, images={name: images[name][order[name]] for name in images}, rows=rows)


@pytest.mark.parametrize("extra", ["", AUGMENT, TURNS])
@pytest.mark.parametrize("kept", [1 << 26, 0])
def test_the_update_does_not_depend_on_the_number_of_workers(make_run, make_store, monkeypatch, extra, kept):
    monkeypatch.setattr(feature_store, "_KEPT_BYTES", kept)
    run = make_run(extra)
    store = with_sessions(make_store(run))
    alone, result = train(run, store, 0)
    for workers in (1, 2):
        state, told = train(run, store, workers)
        assert same(state, alone)
        assert told == result
    assert not same(train(run, store, 2, round_number=2)[0], alone)


@pytest.mark.parametrize("extra", ["", '[model]\ntokenizer = "texture"\n'])
def test_features_that_are_kept_are_those_computed_for_a_batch(make_run, make_store, monkeypatch, extra):
    run = make_run(extra)
    store, states = make_store(run), []
    for kept in (1 << 26, 0):
        monkeypatch.setattr(feature_store, "_KEPT_BYTES", kept)
        monkeypatch.setattr(feature_store, "_CHUNK_BYTES", 1 << 26 if kept else 1)
        states.append(train(run, store, 0)[0])
    assert same(*states)


@pytest.mark.parametrize(("extra", "kept", "are_started"), [("", 1 << 26, False), ("", 0, True), (AUGMENT, 0, True)])
def test_threads_are_started_for_images_and_not_for_features_that_are_kept(
    make_run, make_store, monkeypatch, extra, kept, are_started
):
    """Threads beside the steps take more than 5 % of a round, and batches of kept features 1.5 %."""
    monkeypatch.setattr(feature_store, "_KEPT_BYTES", kept)
    run, seen = make_run(extra), set()
    store = make_store(run)
    steps = {"first_step": 0, "num_steps": STEPS, "site": "a", "round_number": 1, "workers": 2}
    before = threading.active_count()
    Trainer(run).train(
        store, np.arange(len(store.subjects)), **steps, on_step=lambda *_: seen.add(threading.active_count() - before)
    )
    assert (max(seen) > 0) == are_started


class BrokenStore(ImageStore):
    """A store whose images cannot be read from the third batch on."""

    taken = 0

    def images_at(self, stream, positions):
        type(self).taken += 1
        if self.taken > 4:
            raise OSError("cannot read the images")
        return super().images_at(stream, positions)


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_an_error_of_a_worker_is_raised_once_and_training_goes_on_with_the_same_bits(make_run, make_store, workers):
    run, before = make_run(AUGMENT), threading.active_count()
    store = make_store(run)
    BrokenStore.taken = 0
    broken = BrokenStore(store.subjects, store.splits, store.images, store.rows)
    trainer, everyone = Trainer(run), np.arange(len(store.subjects))
    start = {name: value.clone() for name, value in (trainer.shared_state() | trainer.private_state()).items()}
    steps = {"first_step": 0, "num_steps": STEPS, "site": "a", "round_number": 1}
    with pytest.raises(OSError, match="cannot read the images"):
        trainer.train(broken, everyone, **steps, workers=workers)
    assert threading.active_count() == before
    trainer.load_shared({name: start[name] for name in trainer.shared_state()})
    trainer.load_private({name: start[name] for name in trainer.private_state()})
    trainer.train(store, everyone, **steps, workers=workers)
    assert same(trainer.shared_state() | trainer.private_state(), train(run, store, 0)[0])


LARGE = """
name = "many"
[streams]
brain-mr = { spacing-mm = [8.0, 8.0, 8.0], shape = [32, 32, 32], patch = [4, 4, 4] }
[model]
size = "nano"
tokenizer = "statistics"
[train]
batch-size = 4
local-steps = 2
"""
PATIENTS = 20_000
"""Their images are 2.4 GiB in float32, and their patch features would fill 0.9 GiB."""
CAP_BYTES = 300 << 20


def test_a_round_over_many_patients_fits_under_a_cap(tmp_path: Path):
    """Images are a file with holes, whose memory the system may drop and the limit does not count."""
    shape = (PATIENTS, 1, 32, 32, 32)
    images = np.lib.format.open_memmap(tmp_path / "images.npy", mode="w+", dtype=np.float32, shape=shape)
    images = np.load(tmp_path / "images.npy", mmap_mode="r")
    names = tuple(map(str, range(PATIENTS)))
    store = ImageStore(names, ("train",) * PATIENTS, {"brain-mr": images}, {"brain-mr": np.arange(PATIENTS)})
    run, everyone = parse_run(LARGE), np.arange(PATIENTS)
    steps = {"first_step": 0, "num_steps": 2, "site": "a", "round_number": 1, "workers": 2}
    before = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (data_bytes() + CAP_BYTES, before[1]))
    try:
        result = Trainer(run).train(store, everyone, **steps)
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)
    assert result.subjects == PATIENTS


def data_bytes() -> int:
    """Memory of this process that RLIMIT_DATA counts."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmData"))
