"""The study of federated fine-tuning: places without a patient in common, the best site by hand, and a tiny run."""

import os
from collections import Counter

import pytest

from simulations.studies import federated_fine_tuning_study as study
from simulations.studies.federated_fine_tuning_study import LABELS, SITES, add_best_site, draw_places
from simulations.study_result import StudyResult


def pictures(number=120):
    kinds = ("benign", "malignant", "normal")
    return [
        {"file": f"{at}.png", "class": kinds[at % 3], "split": "train" if at % 4 else "test", "subject_group": str(at)}
        for at in range(number)
    ]


def test_places_have_no_patient_in_common_and_sites_train_on_the_training_split():
    places = draw_places(pictures(), "ultrasound", 5)
    assert places == draw_places(pictures(), "ultrasound", 5)
    assert places != draw_places(pictures(), "ultrasound", 6)
    sites = [places[f"sites/{name}"] for name in SITES]
    assert [len(site) for site in sites] == [LABELS] * 3
    assert {one["split"] for site in sites for one in site} == {"train"}
    assert Counter(one["file"] for place in places.values() for one in place).most_common(1)[0][1] == 1
    assert len(places["holdout"]) == 120 - 3 * LABELS


def test_two_pictures_of_one_patient_are_never_in_two_places_of_which_one_is_the_hold_out():
    shared = [one | {"subject_group": str(int(one["subject_group"]) // 2)} for one in pictures()]
    places = draw_places(shared, "xray", 0)
    used = {one["subject_group"] for name, place in places.items() if name != "holdout" for one in place}
    assert not used & {one["subject_group"] for one in places["holdout"]}


def test_the_best_site_is_chosen_draw_by_draw():
    result = StudyResult("x", {})
    for site, values in zip(SITES, ((0.5, 0.9), (0.7, 0.6), (0.6, 0.8)), strict=True):
        for value in values:
            result.add(f"site:{site}", {"auc_xray": value})
    add_best_site(result)
    assert result.values["auc_xray", "best-site"] == [0.7, 0.9]


@pytest.mark.slow
@pytest.mark.skipif("PANFM_REAL_DATA" not in os.environ, reason="PANFM_REAL_DATA is not set: no real images")
def test_every_arm_trains_on_real_pictures(tmp_path, monkeypatch):
    monkeypatch.delenv("PANFM_WEIGHTS", raising=False)
    monkeypatch.setattr(study, "_SCRATCH", study._SCRATCH.replace("rounds = 20", "rounds = 1"))
    monkeypatch.setattr(study, "TASKS", {"ultrasound": "breast-ultrasound"})
    cohort = study.write_draw(study.CohortJob(0, tmp_path / "0"))
    for arm in study.ARMS:
        measured = study.measure(study.ArmJob(0, 0, arm, 0, cohort))
        assert measured.keys() == {"auc_ultrasound", "accuracy_ultrasound"}
        assert all(0.0 <= value <= 1.0 for value in measured.values())
