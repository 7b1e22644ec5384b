"""Scores of classes that the probe did not see, and notes on masks without a Hausdorff distance."""

import numpy as np
import pytest

from panfm.evaluate.scores import draw_counts
from panfm.finetune.task_result import _compare, _hd95_notes, label_scores


def test_a_class_without_a_prediction_is_nobodys_likeliest():
    truth = np.eye(3)[[0, 0, 1, 1, 2]]
    predicted = np.array([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.6, 0.4], [0.2, 0.8]])
    with_gap = np.column_stack([predicted, np.full(5, np.nan)])
    counts = draw_counts(5, 50, 0)
    area, accuracy = label_scores("linear-probe", "classes", with_gap, truth, counts)
    assert accuracy.value == pytest.approx(3 / 5)
    assert area.value == pytest.approx((1 + 4 / 6) / 2)
    order = [4, 2, 0, 3, 1]
    again, _ = label_scores("linear-probe", "classes", with_gap[order], truth[order], counts)
    assert again.value == pytest.approx(area.value)


def test_missed_and_absent_classes_are_told_apart():
    there, nowhere = np.ones((3, 3), bool), np.zeros((3, 3), bool)
    cases = [(there, there), (nowhere, there), (nowhere, there), (there, nowhere), (nowhere, nowhere)]
    measured = np.array([[_compare(predicted, true, true, (1.0, 1.0))] for predicted, true in cases])
    told = "hd95: leaves out 4 of 5 classes of images: 2 missed, 1 predicted but not there, 1 in neither"
    assert list(_hd95_notes(measured)) == [told]
    assert not list(_hd95_notes(measured[:1]))
