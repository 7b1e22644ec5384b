"""A site by itself takes the steps that it would take in a federation."""

from panfm.data.store import ImageStore
from panfm.training.trainer import Trainer
from simulations.alone import train_alone


def test_rounds_steps_and_subjects_are_those_of_a_federation(make_run, make_store, monkeypatch):
    run, seen = make_run(), []

    def note(trainer, store, indices, **words):
        seen.append((indices.tolist(), words))

    monkeypatch.setattr(Trainer, "train", note)
    store = make_store(run, 4)
    splits = ImageStore(store.subjects, ("train", "val", "train", "test"), store.images, store.rows)
    del splits.images["eye-fundus"]
    model = train_alone(run, splits, "alpha")
    assert model.stream_names == ("brain-mr", "heart-ct")
    words = {"num_steps": 4, "site": "alpha"}
    assert seen == [([0, 2], {"first_step": 4 * r, "round_number": r + 1, **words}) for r in range(run.train.rounds)]
