"""Patch features that are kept: in a file beside the images' own, with the same bits, and in no memory."""

import errno
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from panfm.config import parse_run
from panfm.data.packed import PackedImages
from panfm.data.store import ImageStore
from panfm.training import feature_store
from panfm.training.trainer import Trainer


def training(run, store):
    trainer, everyone = Trainer(run), np.arange(len(store.subjects))
    trainer.train(store, everyone, first_step=0, num_steps=3, site="a", round_number=1)
    return trainer.shared_state() | trainer.private_state()


def anonymous_mib():
    """Memory of this process that is no page of a file."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon"))


def mapped(store, folder):
    """The same store with its images in files."""
    files = {}
    for name, image in store.images.items():
        np.save(folder / f"{name}.npy", image)
        files[name] = np.load(folder / f"{name}.npy", mmap_mode="r")
    return replace(store, images=files)


def test_features_of_mapped_images_lie_in_a_file_without_a_name(make_run, make_store, tmp_path):
    run = make_run()
    store, trainer = make_store(run), Trainer(run)
    before = trainer.patch_features(store)
    after = Trainer(run).patch_features(mapped(store, tmp_path))
    assert {name: np.asarray(image).tobytes() for name, image in after.images.items()} == {
        name: np.asarray(image).tobytes() for name, image in before.images.items()
    }
    assert all(isinstance(image, np.memmap) and not image.flags.writeable for image in after.images.values())
    assert {path.suffix for path in tmp_path.iterdir()} == {".npy"}
    assert after.batch([1, 0]).images.keys() == before.batch([1, 0]).images.keys()


def test_features_are_computed_for_each_batch_where_no_file_can_hold_them(make_run, make_store, tmp_path, monkeypatch):
    def full(**_):
        raise OSError(errno.ENOSPC, "No space left on device")

    run = make_run()
    store = mapped(make_store(run), tmp_path)
    kept = training(run, store)
    monkeypatch.setattr(feature_store.tempfile, "TemporaryFile", full)
    assert isinstance(Trainer(run).patch_features(store), feature_store.FeatureStore)
    computed = training(run, store)
    assert all(torch.equal(computed[name], value) for name, value in kept.items())


@pytest.mark.slow
def test_features_of_many_patients_fill_no_memory(make_run, tmp_path):
    """48 MiB of them, of 4000 patients, filled 48 MiB and as much again while they were joined."""
    stream = "brain-mr = { spacing-mm = [2.0, 2.0, 2.0], shape = [32, 32, 32], patch = [8, 8, 8] }"
    run = parse_run(f'name = "many"\n[streams]\n{stream}\n[model]\nsize = "nano"\ntokenizer = "statistics"\n')
    images = np.lib.format.open_memmap(tmp_path / "i.npy", mode="w+", dtype=np.uint8, shape=(4000, 1, 32, 32, 32))
    images[:] = np.arange(32, dtype=np.uint8)
    packed = PackedImages(images, np.tile(np.float32([0, 1]), (4000, 1)))
    rows = np.arange(4000)
    store = ImageStore(tuple(map(str, rows)), ("train",) * 4000, {"brain-mr": packed}, {"brain-mr": rows})
    few = replace(store, rows={"brain-mr": rows[:64]}, images={"brain-mr": PackedImages(images[:64], packed.ranges)})
    trainer = Trainer(run)
    trainer.patch_features(few)
    before = anonymous_mib()
    features = Trainer(run).patch_features(store)
    assert features.images["brain-mr"].nbytes > 40 * 2**20
    assert anonymous_mib() - before < 16
