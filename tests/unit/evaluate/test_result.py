import json
import math

import pytest

from panfm.errors import DataError
from panfm.evaluate.result import ProbeResult, Score, read_result, write_result

RESULT = ProbeResult(
    scores=(
        Score("federated", "all", "auc", 0.7, 0.6, 0.8, 27),
        Score("untrained", "weak", "auc", 0.6, math.nan, 0.7, 8),
    ),
    missing={"federated": {"auc": 0.7, "auc_missing_1": 0.6}},
    balance={"federated": {"effective_rank": 3.5}},
    subjects={"fit": 100, "test": 50},
    notes=("federated: x: not probed",),
    streams={"federated": {"chest-xray": 0.8}},
)


def test_round_trip_keeps_everything_and_nan_is_null(tmp_path):
    path = tmp_path / "probe.json"
    write_result(path, RESULT)
    back = read_result(path)
    assert back.scores[0] == RESULT.scores[0]
    assert math.isnan(back.scores[1].low)
    assert (back.missing, back.balance, back.subjects, back.notes, back.streams) == (
        RESULT.missing,
        RESULT.balance,
        RESULT.subjects,
        RESULT.notes,
        RESULT.streams,
    )
    assert json.loads(path.read_text())["scores"][1]["low"] is None


def test_value_finds_a_score_or_is_nan():
    assert RESULT.value("federated") == 0.7
    assert RESULT.value("untrained", "weak") == 0.6
    assert math.isnan(RESULT.value("untrained"))


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"scores": [{"arm": "a"}], "missing": {}, "balance": {}}'])
def test_a_foreign_file_is_one_line(tmp_path, text):
    path = tmp_path / "probe.json"
    path.write_text(text)
    with pytest.raises(DataError, match=r"probe.json: not a probe result") as caught:
        read_result(path)
    assert "\n" not in str(caught.value)
