"""Scores of labels: a class that the probe did not see."""

import numpy as np
import pytest

from panfm.evaluate.scores import draw_counts
from panfm.finetune.task_result import label_scores


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
