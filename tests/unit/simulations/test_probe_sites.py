"""Probes at the end of a run: each site's own labels against the sums of all."""

import math
from dataclasses import replace

import numpy as np
import pytest

from panfm.config import RunConfig, StreamConfig
from panfm.config.features import FeaturesConfig
from panfm.config.probe import ProbeConfig
from panfm.data.store import ImageStore
from panfm.errors import DataError
from panfm.evaluate.embed import embed_store
from panfm.evaluate.federated_probe import LabelledSite, probe_together
from panfm.evaluate.linear_probe import auc_per_label, fit_regressors
from panfm.evaluate.probe_cohort import Task, evaluate_cohort
from panfm.evaluate.probe_file import LinearProbe, SharedProbe, read_probes, save_probes
from panfm.evaluate.probe_labels import LabelInfo, LabelledStore
from panfm.models import build_model
from simulations.probe_sites import FEDERATED, LDA, LOCAL, probe_sites

STREAM = StreamConfig(shape=(8, 8), patch=(4, 4))
RUN = RunConfig(name="toy", streams={"brain-mr": STREAM, "heart-mr": STREAM}, probe=ProbeConfig(bootstrap=5))
INFO = {"bright": LabelInfo("disease"), "lone": LabelInfo("category"), "size": LabelInfo("volume")}


def make_place(seed, stream, n, split="train", names=("bright", "size")):
    random = np.random.default_rng(seed)
    level = random.random(n).astype(np.float32)
    images = level[:, None, None, None] * 0.5 + random.random((n, 1, 8, 8), dtype=np.float32)
    labels = {"bright": (level > 0.5).astype(float), "size": level.astype(float), "lone": (level > 0.4).astype(float)}
    store = ImageStore(tuple(f"{seed}-{i}" for i in range(n)), (split,) * n, {stream: images}, {stream: np.arange(n)})
    return LabelledStore(store, {name: labels[name] for name in names})


def make_task(run=RUN, sizes=(12, 14, 16)):
    places = [make_place(number, "brain-mr", size) for number, size in enumerate(sizes)]
    places[0] = make_place(0, "brain-mr", sizes[0], names=("bright", "size", "lone"))
    return Task(run, places, make_place(9, "brain-mr", 60, "test", ("bright", "size", "lone")), INFO)


def shared(task, model, names=("bright",)):
    """Probes of all places' sums, as the end of a run fits them."""
    sites = [
        LabelledSite(
            f"site{number}",
            embed_store(model, place.store, place.store.indices("train")),
            {name: place.values([name], place.store.indices("train")) for name in names},
            1,
        )
        for number, place in enumerate(task.places)
    ]
    probes = probe_together(sites).probes
    return {name: SharedProbe((name,), 9, ("site0",), 1.0, (0.5,), probe) for name, probe in probes.items()}


def test_the_federated_probe_is_tested_beside_the_sites_own():
    task, model = make_task(), build_model(RUN)
    result = probe_sites(task, model, shared(task, model))
    assert {(score.arm, score.group) for score in result.scores} == {
        (arm, group) for arm in (FEDERATED, LOCAL) for group in ("all", "disease")
    }
    fit = np.concatenate(
        [embed_store(model, place.store, np.arange(len(place.store.subjects))) for place in task.places]
    )
    truth_fit, truth = task.targets(["bright"])
    probe = fit_regressors(fit, truth_fit, ["bright"])
    test = embed_store(model, task.holdout.store, task.test_indices)
    expected = auc_per_label(probe.score(test), truth, task.counts)[0, 0]
    assert result.value(FEDERATED) == expected
    assert result.value(FEDERATED) > result.value(LOCAL)


def test_discriminants_are_an_arm_where_the_run_fitted_them(tmp_path):
    """The probe of one label is a ridge regression and its negative, also when read back from the model's folder."""
    task, model = make_task(), build_model(RUN)
    probe = shared(task, model)["bright"]
    turned = replace(probe.probe, weights=-probe.probe.weights)
    save_probes(tmp_path, {"bright": replace(probe, lda=turned)}, "cls")
    result = probe_sites(task, model, read_probes(tmp_path))
    assert {score.arm for score in result.scores} == {FEDERATED, LOCAL, LDA}
    assert result.value(LDA) == pytest.approx(1 - result.value(FEDERATED))
    unfitted = replace(probe, lda=replace(turned, bias=np.array([np.nan])))
    assert math.isnan(probe_sites(task, model, {"bright": unfitted}).value(LDA))


def test_a_site_of_one_class_has_no_probe_of_its_own():
    task, model = make_task(), build_model(RUN)
    task.places[2].labels["bright"][:] = 1.0
    probes = shared(task, model)
    without = Task(RUN, task.places[:2], task.holdout, INFO)
    assert probe_sites(task, model, probes).value(LOCAL) == probe_sites(without, model, probes).value(LOCAL)


def test_a_probe_of_several_labels_is_tested_label_by_label_and_others_are_left_out():
    task, model = make_task(), build_model(RUN)
    [one] = shared(task, model).values()
    twice = LinearProbe(one.probe.centre, one.probe.scale, np.repeat(one.probe.weights, 2, 1), np.zeros(2))
    both = {"pair": SharedProbe(("size", "bright"), 9, ("site0",), 1.0, (0.5, 0.5), twice)}
    assert probe_sites(task, model, both).value(FEDERATED) == probe_sites(task, model, {"b": one}).value(FEDERATED)
    assert probe_sites(task, model, {}).scores == ()


def test_probes_are_read_back_as_they_were_written(tmp_path):
    task, model = make_task(), build_model(RUN)
    [one] = shared(task, model).values()
    assert read_probes(tmp_path) == {}
    save_probes(tmp_path, {"bright": replace(one, r2=(math.nan,))}, "cls")
    [again] = read_probes(tmp_path).values()
    assert math.isnan(again.r2[0])
    assert replace(again, r2=one.r2, probe=one.probe) == one
    np.testing.assert_array_equal(again.probe.weights, one.probe.weights)
    (tmp_path / "probe.safetensors").write_bytes(b"12345678{}")
    with pytest.raises(DataError, match="not the probes of a run"):
        read_probes(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("pooling", ["cls", "layers"])
def test_every_arm_of_a_cohort_is_whitened_if_the_run_wants_it(pooling):
    features = FeaturesConfig(pooling=pooling, whitening=True, whitening_crops=20)
    run = RUN.model_copy(update={"features": features})
    task = make_task(run)
    models = {"federated": build_model(run), "site:one": build_model(run, ["brain-mr"]), "untrained": build_model(run)}
    evaluate_cohort(task, models, grid_arms=())
    assert all(model.whitening is not None for model in models.values())
    np.testing.assert_array_equal(models["federated"].whitening.matrix, models["untrained"].whitening.matrix)
    plain = make_task()
    model = build_model(RUN)
    evaluate_cohort(plain, {"federated": model}, grid_arms=())
    assert model.whitening is None
