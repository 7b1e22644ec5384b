"""`panfm.runs`: data frames of run folders."""

import json
import math

import pytest

import panfm
from panfm.config import dump_toml
from panfm.errors import ConfigError, DataError
from panfm.evaluate.result import ProbeResult, Score, write_result
from tests.unit.report.test_status import line


@pytest.fixture
def folder(tmp_path, make_run):
    """Two runs, one probed, and a folder that is none."""
    for name, rounds in (("first", 2), ("second", 1)):
        run = tmp_path / "runs" / name
        run.mkdir(parents=True)
        (run / "run.toml").write_text(dump_toml(make_run()))
        lines = [json.dumps(line(number)) for number in range(1, rounds + 1)]
        (run / "rounds.jsonl").write_text("\n".join(lines) + "\n")
    score = Score("federated", "all", "auc", 0.7, 0.6, math.nan, 3)
    write_result(tmp_path / "runs" / "first" / "probe.json", ProbeResult((score,), {}, {}, {}))
    (tmp_path / "runs" / "notes").mkdir()
    return tmp_path / "runs"


def test_rounds_sites_and_probes_of_all_runs(folder):
    tables = panfm.runs(folder)
    assert list(tables.rounds[["run", "round"]].itertuples(index=False, name=None)) == [
        ("first", 1),
        ("first", 2),
        ("second", 1),
    ]
    written = line(2)
    row = tables.rounds.iloc[1]
    assert row.loss == written["loss"]
    assert row.bytes_up == sum(written["bytes_up"].values())
    assert row["saliency:brain-mr"] == written["profile"]["brain-mr"]
    of_site = tables.sites[(tables.sites.run == "first") & (tables.sites["round"] == 2)]
    assert set(of_site.site) == set(written["sites"])
    assert of_site.set_index("site").loss["a"] == written["sites"]["a"]["loss"]
    [probe] = tables.probes.to_dict("records")
    assert (probe["run"], probe["arm"], probe["value"], probe["num_labels"]) == ("first", "federated", 0.7, 3)
    assert math.isnan(probe["high"])


def test_one_run_folder(folder):
    tables = panfm.runs(folder / "second")
    assert tables.rounds.run.tolist() == ["second"]
    assert tables.probes.empty
    assert "value" in tables.probes.columns


def test_no_run_and_a_broken_run_are_one_line(folder, tmp_path):
    for place in (folder / "notes", tmp_path / "absent"):
        with pytest.raises(DataError, match="found no run folder, expected one, or a folder of some"):
            panfm.runs(place)
    (folder / "second" / "run.toml").write_text("name = 3\n")
    with pytest.raises(ConfigError, match=r"second/run\.toml"):
        panfm.runs(folder)
