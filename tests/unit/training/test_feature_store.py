"""Patch features that are kept: in a file beside the images' own, with the same bits, and in no memory."""

import errno
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

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
