"""A model that a site reached alone is used again if nothing that it depends on has changed, and only then."""

import os
import time
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

import simulations
from panfm.registry import MASKING_POLICIES
from panfm.training.policies import RandomPolicy
from simulations import kept_models
from simulations.alone import train_alone
from simulations.kept_models import FOLDER, kept_or_trained, model_key

KEYS = ("a" * 64, "b" * 64, "c" * 64)


@pytest.fixture(autouse=True)
def settled(monkeypatch):
    """Source files that someone edits now count as old."""
    monkeypatch.setattr(kept_models, "_LOADED_AT", time.time())
    monkeypatch.setattr(kept_models, "_SETTLED_S", -0.001)


@pytest.fixture
def run(make_run):
    return make_run()


@pytest.fixture
def store(make_store, run):
    return make_store(run, 4, complete=True)


def changed_image(store):
    images = {name: image.copy() for name, image in store.images.items()}
    last = next(reversed(images.values()))
    last.flat[-1] = np.nextafter(last.flat[-1], np.float32(2))
    return replace(store, images=images)


def test_the_key_is_that_of_equal_inputs(run, store, make_store):
    again = make_store(run, 4, complete=True)
    first, second = (model_key(run, of, "alpha", {"a": torch.ones(2, 3)}) for of in (store, again))
    assert first
    assert first == second


def test_whatever_a_model_depends_on_changes_the_key(run, store, monkeypatch, tmp_path):
    start = {"a": torch.ones(2, 3)}
    labels = np.array([[0.0], [1.0], [np.nan], [0.0]], dtype=np.float32)
    train = run.train.model_copy(update={"learning_rate": run.train.learning_rate * 2})
    first = next(iter(store.rows))
    key = partial(model_key, run, name="alpha", start=start)
    keys = [
        key(store),
        model_key(run.model_copy(update={"train": train}), store, "alpha", start),
        model_key(run, store, "beta", start),
        model_key(run, store, "alpha", None),
        model_key(run, store, "alpha", {"a": torch.ones(3, 2)}),
        model_key(run, store, "alpha", {"a": torch.ones(2, 3) + 1e-7}),
        key(changed_image(store)),
        key(replace(store, splits=("val", *store.splits[1:]))),
        key(replace(store, subjects=store.subjects[::-1])),
        key(replace(store, rows=store.rows | {first: store.rows[first][::-1].copy()})),
        key(replace(store, labels=labels)),
        key(replace(store, labels=1 - labels)),
    ]
    monkeypatch.setattr(simulations, "__path__", [str(tmp_path)])
    for content in ("a = 1", "a = 2"):
        (tmp_path / "code.py").write_text(content)
        os.utime(tmp_path / "code.py", (0, 0))
        keys.append(key(store))
    assert None not in keys
    assert len(set(keys)) == len(keys)
    os.utime(tmp_path / "code.py", (later := time.time() + 60, later))
    assert key(store) is None  # the code that was loaded may be another


class Mine(RandomPolicy):
    """A policy of a notebook or of an installed package."""


def test_nothing_is_kept_where_a_plug_in_takes_part(run, store, monkeypatch, tmp_path):
    monkeypatch.setitem(MASKING_POLICIES._targets, "mine", Mine)
    assert model_key(run, store, "alpha", None)
    run = run.model_copy(update={"masking": run.masking.model_copy(update={"policy": "mine"})})
    assert model_key(run, store, "alpha", None) is None
    model = train_alone(run, store, "alpha")
    assert kept_or_trained(tmp_path, None, run, store, lambda: model) is model
    assert not list(tmp_path.iterdir())


def test_a_kept_model_has_the_bits_of_the_trained_one(run, store, tmp_path):
    trained = kept_or_trained(tmp_path, KEYS[0], run, store, lambda: train_alone(run, store, "alpha"))
    kept = kept_or_trained(tmp_path, KEYS[0], run, store, lambda: pytest.fail("trained again"))
    batch = store.batch([0, 1, 2])
    with torch.no_grad():
        assert torch.equal(kept.eval().embed(batch), trained.eval().embed(batch))
    assert all(torch.equal(value, kept.state_dict()[name]) for name, value in trained.state_dict().items())


def test_the_newest_two_are_kept_and_a_damaged_one_is_trained_again(run, store, tmp_path):
    model = train_alone(run, store, "alpha")
    for age, key in enumerate(KEYS):
        kept_or_trained(tmp_path, key, run, store, lambda: model)
        os.utime(tmp_path / FOLDER / f"{key}.safetensors", (age, age))
    assert {path.stem for path in (tmp_path / FOLDER).iterdir()} == set(KEYS[1:])
    (tmp_path / FOLDER / f"{KEYS[2]}.safetensors").write_bytes(b"\x00" * 40)
    assert kept_or_trained(tmp_path, KEYS[2], run, store, lambda: model) is model


def test_a_folder_that_cannot_be_written_to_keeps_nothing(run, store, tmp_path):
    (tmp_path / FOLDER.parent).write_text("a file")
    model = train_alone(run, store, "alpha")
    assert kept_or_trained(tmp_path, KEYS[0], run, store, lambda: model) is model
