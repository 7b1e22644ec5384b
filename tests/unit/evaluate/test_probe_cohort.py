import numpy as np
import pytest

from panfm.config import RunConfig, StreamConfig
from panfm.config.probe import ProbeConfig
from panfm.data.store import ImageStore
from panfm.errors import DataError
from panfm.evaluate.probe_cohort import Task, evaluate_cohort
from panfm.evaluate.probe_labels import LabelInfo, LabelledStore
from panfm.models import build_model

STREAM = StreamConfig(shape=(4, 4, 4), patch=(4, 4, 4), spacing_mm=(1.0, 1.0, 1.0))
RUN = RunConfig(
    name="toy",
    streams={"brain-mr": STREAM, "heart-mr": STREAM, "liver-mr": STREAM},
    probe=ProbeConfig(bootstrap=20),
)
INFO = {
    "bright-brain": LabelInfo("disease", weak=True),
    "dense-liver": LabelInfo("category"),
    "never": LabelInfo("disease"),
    "brain-mean": LabelInfo("volume"),
}


def make_place(seed, streams, n=60, split="train"):
    """Volumes whose mean level is the subject's latent; labels read it off."""
    generator = np.random.default_rng(seed)
    level = generator.random((n, 3)).astype(np.float32)
    noise = generator.random((n, 3, 1, 4, 4, 4), dtype=np.float32) * 0.1
    volumes = level[:, :, None, None, None, None] * 0.8 + noise
    order = list(RUN.streams)
    images = {name: volumes[:, order.index(name)] for name in streams}
    labels = {
        "bright-brain": (level[:, 0] > 0.5).astype(float),
        "dense-liver": (level[:, 2] > 0.5).astype(float),
        "never": np.zeros(n),
        "brain-mean": 1000 * level[:, 0].astype(float),
    }
    rows = {name: np.arange(n) for name in streams}
    store = ImageStore(tuple(f"{seed}-{i}" for i in range(n)), (split,) * n, images, rows)
    return LabelledStore(store, labels)


def make_task():
    places = [make_place(1, ["brain-mr", "heart-mr"]), make_place(2, ["liver-mr"])]
    return Task(RUN, places, make_place(3, list(RUN.streams), split="test"), INFO)


@pytest.fixture(scope="module")
def result():
    steps = []
    models = {"federated": build_model(RUN), "site:liver": build_model(RUN, ["liver-mr"])}
    found = evaluate_cohort(make_task(), models, on_arm=lambda *step: steps.append(step))
    assert steps == [
        (name, at, 5) for at, name in enumerate(["federated", "site:liver", "statistics", "tokenizer", "training-mean"])
    ]
    return found


def test_statistics_read_what_is_there_and_the_mean_reads_nothing(result):
    assert result.value("statistics", "disease") > 0.9
    assert result.value("statistics", "category") > 0.9
    assert result.value("statistics", "brain-mean", "r2") > 0.8
    assert result.value("training-mean", "all") == 0.5
    assert -0.1 < result.value("training-mean", "brain-mean", "r2") <= 0.0


def test_the_reference_tokenizer_reads_the_patch_features(result):
    assert result.value("tokenizer", "disease") > 0.9
    task = make_task()
    voxels = RUN.model_copy(update={"model": RUN.model.model_copy(update={"tokenizer": "patch"})})
    probed = evaluate_cohort(Task(voxels, task.places, task.holdout, INFO), {})
    assert {score.arm for score in probed.scores} == {"statistics", "training-mean"}


def with_few_labels(numbers, draws=2):
    return RUN.model_copy(update={"probe": RUN.probe.model_copy(update={"few_labels": numbers, "few_draws": draws})})


@pytest.mark.slow
def test_probes_of_few_labels_are_fitted_on_the_same_patients_in_every_arm(result):
    assert result.few_labels == {}
    task = make_task()
    models = {"site:liver": build_model(RUN, ["liver-mr"])}
    probed = evaluate_cohort(Task(with_few_labels((12, 500)), task.places, task.holdout, INFO), models)
    assert set(probed.few_labels) == {"site:liver", "statistics", "tokenizer", "training-mean"}
    few = probed.few_labels["statistics"]
    assert list(few) == ["auc_12", "auc_500"]
    assert few["auc_12"] < few["auc_500"]
    assert few["auc_500"] == pytest.approx(probed.value("statistics"))  # there are 120
    assert np.isnan(probed.few_labels["site:liver"]["auc_12"])  # too few of twelve hold a liver
    assert probed.value("statistics") == result.value("statistics")


def test_an_arm_without_the_organ_cannot_read_its_label(result):
    assert result.value("site:liver", "category") > 0.8
    assert result.value("site:liver", "weak") < 0.7
    assert result.value("site:liver", "brain-mean", "r2") < 0.2


def test_a_label_of_one_class_is_left_out_with_a_note(result):
    assert any(score.group == "all" and score.num_labels == 2 for score in result.scores)
    assert "federated: never: not probed, fit subjects are all of one class" in result.notes


def test_only_the_wanted_arms_have_a_grid(result):
    assert set(result.missing) == {"federated"}
    assert set(result.missing["federated"]) == {
        "auc",
        "auc_missing_1",
        "auc_missing_2",
        *(f"auc_{what}_{organ}" for what in ("drop", "only") for organ in ("brain", "heart", "liver")),
        "auc_no_dominant",
    }
    assert result.streams == {}
    assert result.missing["federated"]["auc"] == pytest.approx(result.value("federated"))


def test_twice_gives_the_same_answer(result):
    models = {"federated": build_model(RUN), "site:liver": build_model(RUN, ["liver-mr"])}
    again = evaluate_cohort(make_task(), models)
    assert again.scores == result.scores
    assert again.subjects == {"fit": 120, "test": 60}


def test_no_site_is_refused():
    task = make_task()
    with pytest.raises(DataError, match="expected held-out subjects and sites"):
        evaluate_cohort(Task(RUN, [], task.holdout, INFO), {})


def test_an_arm_with_too_few_labelled_subjects_is_left_out_with_a_note():
    task = make_task()
    few = make_place(4, ["heart-mr"], n=6)
    task = Task(RUN, [task.places[1], few], task.holdout, INFO)
    found = evaluate_cohort(task, {"site:heart": build_model(RUN, ["heart-mr"])}, grid_arms=("site:heart",))
    assert {score.arm for score in found.scores} == {"statistics", "tokenizer", "training-mean"}
    assert found.notes[0].startswith("site:heart: not probed, 6 labelled training subjects")
    assert "site:heart" not in {*found.missing, *found.balance}


def test_subjects_without_any_label_change_nothing(result):
    task = make_task()
    unlabelled = LabelledStore(make_place(9, ["brain-mr"]).store, {})
    models = {"federated": build_model(RUN)}
    found = evaluate_cohort(Task(RUN, [*task.places, unlabelled], task.holdout, INFO), models)
    assert found.value("federated", "brain-mean", "r2") == result.value("federated", "brain-mean", "r2")


def make_pictures(seed, streams, n=90, splits=("test",)):
    """Every subject holds one stream, in turn; its mean level is the label."""
    generator = np.random.default_rng(seed)
    level = generator.random(n).astype(np.float32)
    volumes = 0.8 * level[:, None, None, None, None] + 0.1 * generator.random((n, 1, 4, 4, 4), dtype=np.float32)
    rows = {name: np.arange(at, n, len(streams)) for at, name in enumerate(streams)}
    images = {name: volumes[held] for name, held in rows.items()}
    split = tuple(splits[subject // len(streams) % len(splits)] for subject in range(n))
    store = ImageStore(tuple(f"{seed}-{each}" for each in range(n)), split, images, rows)
    return LabelledStore(store, {"bright": (level > 0.5).astype(float)})


def read_pictures(holdout_splits):
    sites = [make_pictures(1, ["brain-mr"], splits=("train",)), make_pictures(2, ["heart-mr"], splits=("train",))]
    holdout = make_pictures(3, list(RUN.streams), splits=holdout_splits)
    task = Task(RUN, sites, holdout, {"bright": LabelInfo("class")})
    return evaluate_cohort(task, {"federated": build_model(RUN)}, grid_arms=("federated", "statistics"))


def test_subjects_of_one_stream_each_are_read_per_stream():
    found = read_pictures(("train", "test"))
    assert found.missing == {}
    assert found.subjects == {"fit": 225, "test": 45}
    assert set(found.streams) == {"federated", "statistics"}
    assert set(found.streams["statistics"]) == set(RUN.streams)
    assert min(found.streams["statistics"].values()) > 0.9  # liver-mr: no site has it, the held-out folder trains on it
    assert found.value("statistics", "all") > 0.9
    assert {score.group for score in found.scores} == {"all"}


def test_a_stream_that_nobody_can_be_fitted_on_has_no_answer():
    found = read_pictures(("test",))
    assert found.subjects == {"fit": 180, "test": 90}
    assert np.isnan(found.streams["statistics"]["liver-mr"])
    assert found.streams["statistics"]["brain-mr"] > 0.9
