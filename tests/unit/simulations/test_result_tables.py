"""Tables of docs/results that are made from kept result files."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from simulations.documents.kept_results import KeptResult, by_seed, short, signed, with_spread
from simulations.documents.result_tables import filled, marks, tables
from simulations.documents.study_tables import measured_at, targets
from simulations.studies import dex_pictures_study, real_pictures_study
from simulations.study_result import StudyResult, Target

DATA = Path(__file__).parents[3] / "docs" / "results" / "data"


def written(folder, name, rows, **more):
    """Write a result file from rows (metric, arm, values, seeds)."""
    results = [
        {"metric": metric, "arm": arm, "values": values} | ({"seeds": seeds} if seeds else {})
        for metric, arm, values, seeds in rows
    ]
    (folder / f"{name}.json").write_text(json.dumps({"commit": "abc", "results": results} | more))
    return KeptResult.read(folder / f"{name}.json")


def test_numbers_by_hand():
    assert [short(value) for value in (0.6774, 1.0, -0.0203, 0.99996, 10.26)] == [
        ".677",
        "1.000",
        "-.020",
        "1.000",
        "10.260",
    ]
    assert [signed(value, 4) for value in (0.04, -0.00201, 1.5)] == ["+.0400", "-.0020", "+1.5000"]
    assert with_spread([0.5, 0.7]) == ".600 ± .141"
    assert (with_spread([0.5]), with_spread([0.5, 0.5004]), with_spread([])) == (".500", ".500", "")
    assert by_seed([0.1, -0.2]) == "+.100 -.200"


def test_gains_are_taken_over_the_seeds_that_both_arms_have(tmp_path):
    rows = [("a", "x", [0.5, 0.6, 0.9], [0, 1, 2]), ("a", "y", [0.5, 0.1], [2, 0]), ("b", "x", [1.0], [0])]
    kept = written(tmp_path, "made", rows)
    assert (kept.arms, kept.metrics, kept.seeds(), kept.seeds("x", "y")) == (["x", "y"], ["a", "b"], [0, 1, 2], [0, 2])
    np.testing.assert_allclose(kept.gains(["a", "b"], "x", "y"), [[0.4, 0.4]])
    assert (kept.of("a", "y"), kept.of("b", "y")) == ([0.1, 0.5], [])
    assert kept.gains(["b"], "x", "y").shape == (0, 2)
    kept = written(tmp_path, "fewer", [*rows, ("b", "y", [0.25], [0])])
    np.testing.assert_allclose(kept.gains(["a", "b"], "x", "y"), [[0.4], [0.75]])


def test_seeds_of_a_file_may_stand_in_its_pairs(tmp_path):
    rows = [("a", "x", [0.5, 0.6], None)]
    assert written(tmp_path, "made", rows, config={"pairs": [[7, 3], [8, 4]]}).seeds() == [3, 4]
    with pytest.raises(ValueError, match="zip"):
        written(tmp_path, "made", rows, config={"pairs": [[7, 3]]})


def test_a_result_by_place_has_metrics_with_the_place_before_them_and_targets(tmp_path):
    result = StudyResult("made", {"pairs": [[0, 0]]}, targets=[Target("gain", 0.2, 0.1), Target("lost", math.nan, 0.0)])
    result.add("x", {"lasting/auc": 0.5, "auc": math.nan})
    result.write(tmp_path / "made.json")
    kept = KeptResult.read(tmp_path / "made.json")
    assert kept.of("lasting/auc", "x") == [0.5]
    assert math.isnan(kept.of("auc", "x")[0])
    assert [target.is_met for target in kept.targets] == [True, False]
    assert "| gain | +.100 | +.200: met |" in targets(kept)
    assert "**missed**" in targets(kept)


def test_seeds_of_several_draws_have_the_draw_before_them(tmp_path):
    kept = written(tmp_path, "made", [("a", "x", [0.5, 0.6], None)], config={"pairs": [[0, 3], [1, 3]]})
    assert kept.seeds() == [3, 103]
    assert measured_at(kept) == "Commit abc, seeds 3 on each of draws 0, 1.\n"
    with pytest.raises(ValueError, match="stands twice"):
        written(tmp_path, "made", [("a", "x", [0.5, 0.6], None)], config={"pairs": [[0, 3], [0, 3]]})


def test_masking_policies_are_compared_with_random_masking_pair_by_pair(tmp_path):
    result = StudyResult("sgm", {"pairs": [[0, 0], [0, 1], [1, 0]]}, targets=[Target("ahead", 0.1, 0.0)])
    for random, guided in ((0.5, 0.6), (0.6, 0.6), (0.7, 0.9)):
        result.add("random", {"lasting/auc": random})
        result.add("sgm", {"lasting/auc": guided})
    result.write(tmp_path / "sgm.json")
    shown = tables(tmp_path)["sgm"]
    assert "| `lasting` | random | .600 |" in shown
    assert "| `lasting` | sgm | .700 (+.100 ± .100, 2 of 3) |" in shown
    assert "| ahead |" in shown


def test_arms_beside_the_first_by_hand(tmp_path):
    result = StudyResult("coding", {"pairs": [[0, 0], [0, 1]]})
    for arm, values, sent in (("float32", (0.5, 0.6), 100.0), ("int8", (0.51, 0.58), 25.0)):
        for value in values:
            result.add(arm, {"auc": value, "bytes_up_round": sent})
    result.write(tmp_path / "coding.json")
    assert "| int8 | .5100 | .5800 | -.0050 (1 of 2) | .250 |" in tables(tmp_path)["coding"]


def test_damage_of_an_attack_by_hand(tmp_path):
    """Of a fall from 2 to 1 that the honest federation reached, an attack that ends at 1.1 takes a tenth."""
    result = StudyResult("poisoning", {"pairs": [[0, 0], [1, 1]]})
    losses = {"untrained": [2.0, 3.0], "honest": [1.0, 1.0], "scaling/weighted/default": [1.1, 1.5]}
    for arm, values in losses.items():
        for loss in values:
            result.add(arm, {"val_loss": loss, "site_share": 0.25})
    result.write(tmp_path / "poisoning.json")
    assert "| scaling | 10.0 % | 25.0 % | 17.5 % | .25 |" in tables(tmp_path)["poisoning"]


def test_what_stands_between_marks_is_replaced():
    page = "a\n<!-- made: one -->\n\nold\nlines\n\n<!-- end -->\nb\n"
    assert marks(page) == ["one"]
    assert filled(page, {"one": "new\n"}) == "a\n<!-- made: one -->\n\nnew\n\n<!-- end -->\nb\n"
    assert filled(filled(page, {"one": "new\n"}), {"one": "new\n"}) == filled(page, {"one": "new\n"})
    assert filled("no marks", {}) == "no marks"
    with pytest.raises(KeyError, match="one"):
        filled(page, {})


def test_without_result_files_tables_say_so(tmp_path):
    assert {text.split("**")[1] for text in tables(tmp_path).values()} == {"Not measured yet"}


def test_differences_are_those_of_the_study():
    """The study computes its answers from arms, and metrics, with the same seeds."""
    kept = KeptResult.read(DATA / "real-pictures.json")
    complete = [arm for arm in kept.arms if kept.seeds(arm) == kept.seeds()]
    result = StudyResult("real-pictures", {})
    result.values = {
        (metric, arm): kept.of(metric, arm)
        for (metric, arm), values in kept.values.items()
        if arm in complete and [*values] == kept.seeds()
    }
    real_pictures_study.add_answers(result)
    table = tables(DATA)["real-pictures-differences"]
    rows = [line.split(" | ") for line in table.splitlines() if line.removeprefix("| ").split(" ")[0] in complete]
    compared = [row for row in rows if row[0].endswith(tuple(complete))]
    assert len(compared) >= 3
    for name, mean, _, worst, *_ in compared:
        pair = name.removeprefix("| ").replace(" minus ", "-minus-")
        assert mean == signed(result.ratios[f"cells/{pair}"], 4)
        assert worst.split()[1] == signed(result.ratios[f"worst-stream/{pair}"], 4)


def test_a_result_file_of_director_experts(tmp_path):
    """Tables are made from a file that the study writes, here of two seeds with made-up values."""
    result = StudyResult("dex-pictures", {"pairs": [[0, 0], [1, 1]]})
    for at, arm in enumerate(dex_pictures_study.ARMS):
        values = dict.fromkeys(dex_pictures_study.METRICS, 0.5 + 0.1 * at)
        for seed in (0, 1):
            result.add(arm, {**values, "own_5": 0.5 + 0.1 * at + 0.01 * seed, "bytes_round": 2e6 * at})
    result.write(tmp_path / "dex-pictures.json")
    table = tables(tmp_path)["dex-pictures"]
    assert "| a site's own modality, 5 % | .505 ± .007 | .605 ± .007 |" in table
    assert "| MB a round | 0.00 | 2.00 | 4.00 | 6.00 | 8.00 |" in table
    assert "| private minus dense | +.1000 (+.1000 +.1000) | +.1000 (+.1000 +.1000) |" in table


def test_tables_of_missing_organs(tmp_path):
    """Two seeds: late fusion is .01 and .03 behind with organs missing."""
    metrics = ["auc", *(f"auc_missing_{number}" for number in range(1, 7)), "category", "category_missing"]
    metrics += ["disease", "disease_missing", "auc_without_brain", "label_stroke", "label_missing_stroke"]
    rows = [(metric, arm, [0.7, 0.8], None) for metric in metrics for arm in ("federated", "late-fusion")]
    rows += [("auc_missing", "federated", [0.65, 0.66], None), ("auc_missing", "late-fusion", [0.64, 0.63], None)]
    written(tmp_path, "pan-fm", rows, config={"pairs": [[0, 0], [1, 1]]})
    made = tables(tmp_path)
    assert "| federated | .750 | .750 | .750 | .750 | .750 | .750 | .750 | .655 |" in made["pan-fm"]
    assert "| late-fusion | +.000 (+.000 +.000) | +.020 (+.010 +.030) |" in made["pan-fm-differences"]
    assert made["pan-fm-organs"].startswith("| AUC without | brain |")
    assert "| stroke | .750 / .750 | .750 / .750 |" in made["pan-fm-labels"]


def test_a_result_file_names_a_start_model_without_its_folder(tmp_path):
    config = {"runs": [{"start": {"model": "/home/somebody/weights.safetensors", "inflate": "mean"}}], "turns": 3}
    StudyResult("toy", config).write(tmp_path / "toy.json")
    written_config = json.loads((tmp_path / "toy.json").read_text())["config"]
    assert written_config == {"runs": [{"start": {"model": "weights.safetensors", "inflate": "mean"}}], "turns": 3}
