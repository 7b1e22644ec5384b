"""Probes at the end of a run: each site's own labels against the sums of all."""

import math

import numpy as np
import pytest

from panfm.config import RunConfig, SiteConfig, StreamConfig
from panfm.config.features import FeaturesConfig
from panfm.config.probe import ProbeConfig
from panfm.data.store import ImageStore
from panfm.evaluate.embed import embed_store
from panfm.evaluate.linear_probe import auc_per_label, fit_regressors
from panfm.evaluate.probe_cohort import Task, evaluate_cohort
from panfm.evaluate.probe_labels import LabelInfo, LabelledStore
from panfm.evaluate.probe_sites import FEDERATED, LOCAL, probe_sites
from panfm.models import build_model

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


def configs(floor=1, count=3):
    limits = {"smallest-batch": floor, "smallest-steps": 1}
    return [SiteConfig.model_validate({"name": f"site{number}", "limits": limits}) for number in range(count)]


def test_the_federated_probe_is_the_ridge_on_all_labels_and_labels_of_one_site_are_left_out():
    task, model = make_task(), build_model(RUN)
    result = probe_sites(task, model, configs())
    assert {(score.arm, score.group) for score in result.scores} == {
        (arm, group) for arm in (FEDERATED, LOCAL) for group in ("all", "disease")
    }
    assert result.notes == ()
    fit = np.concatenate(
        [embed_store(model, place.store, np.arange(len(place.store.subjects))) for place in task.places]
    )
    truth_fit, truth = task.targets(["bright"])
    probe = fit_regressors(fit, truth_fit, ["bright"])
    test = embed_store(model, task.holdout.store, task.test_indices)
    expected = auc_per_label(probe.score(test), truth, task.counts)[0, 0]
    assert result.value(FEDERATED) == expected
    assert result.value(FEDERATED) > result.value(LOCAL)


def test_floors_of_the_sites_hold_and_are_told():
    result = probe_sites(make_task(), build_model(RUN), configs(floor=60))
    assert math.isnan(result.value(FEDERATED))
    assert result.value(LOCAL) > 0.5
    assert result.notes[0] == "federated-probe: site0: 1 of 1 labels given in part or not at all, too few patients"
    assert len(result.notes) == 3


def test_a_site_of_one_class_has_no_probe_of_its_own_and_gives_its_sums():
    task = make_task()
    task.places[2].labels["bright"][:] = 1.0
    both = probe_sites(task, build_model(RUN), configs())
    without = Task(RUN, task.places[:2], task.holdout, INFO)
    assert both.value(LOCAL) == probe_sites(without, build_model(RUN), configs(count=2)).value(LOCAL)
    assert both.value(FEDERATED) != probe_sites(without, build_model(RUN), configs(count=2)).value(FEDERATED)


def test_a_run_with_a_claim_and_large_embeddings_get_one_line(monkeypatch):
    monkeypatch.setattr("panfm.evaluate.probe_sites.privacy_label", lambda run: "(8, 0.001)-DP")
    result = probe_sites(make_task(), build_model(RUN), configs())
    assert result.scores == ()
    assert result.notes == (
        "federated-probe: left out, sums of labels are not covered by the run's claim ((8, 0.001)-DP)",
    )
    monkeypatch.undo()
    monkeypatch.setattr("panfm.evaluate.probe_sites.MAX_FEATURES", 47)
    [note] = probe_sites(make_task(), build_model(RUN), configs()).notes
    assert note == "federated-probe: left out, embeddings have more than 47 numbers"


def test_nothing_is_shared_where_sites_hold_labels_of_other_names():
    task = make_task()
    apart = [LabelledStore(place.store, {f"own{i}": place.labels["bright"]}) for i, place in enumerate(task.places)]
    info = {f"own{i}": LabelInfo("disease") for i in range(3)}
    result = probe_sites(Task(RUN, apart, task.holdout, info), build_model(RUN), configs())
    assert (result.scores, result.notes) == ((), ())
    task.places[1].labels["bright"][:] = np.nan
    task.places[2].labels["bright"][:] = np.nan
    assert probe_sites(task, build_model(RUN), configs()).scores == ()


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
