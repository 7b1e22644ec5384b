"""A site by itself takes the steps that it would take in a federation."""

from panfm.data.store import ImageStore
from panfm.evaluate.input_sums import measured_constants
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


def test_constants_of_inputs_are_those_of_the_store_and_not_of_the_federation(make_run, make_store, monkeypatch):
    monkeypatch.setattr(Trainer, "train", lambda *_, **__: None)
    run, store = make_run(), make_store(make_run(), 5, complete=True)
    of_all = {"input_constants": "summed", "input_centre": (9.0,) * 3, "input_scale": (9.0,) * 3}
    streams = run.streams | {name: run.streams[name].model_copy(update=of_all) for name in ("brain-mr", "heart-ct")}
    model = train_alone(run.model_copy(update={"streams": streams}), store, "alpha")
    own = measured_constants(run, [store])
    for name in ("brain-mr", "heart-ct"):
        assert list(model.stream_configs[name].input_centre) == own[name][0]
        assert list(model.stream_configs[name].input_scale) == own[name][1]
    assert model.stream_configs["eye-fundus"].input_centre is None
