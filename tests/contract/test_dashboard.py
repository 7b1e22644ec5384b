"""The Grafana dashboard asks for metrics that exist, by labels that they have, and leaves none out."""

import json
import re
from pathlib import Path

import pytest

from panfm.cli.site_metrics import METRICS as SITE_METRICS
from server.metrics import METRICS as RUN_METRICS

PATH = Path(__file__).parents[2] / "configs" / "deployment" / "grafana" / "panfm.json"
DASHBOARD = json.loads(PATH.read_text(encoding="utf-8"))
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
VARIABLES = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}
NAME = re.compile(r"panfm_[a-z_]+")
LABELS = {"run": {"run", "site", "kind"}, "site": {"site", "record", "limit", "content"}}


def queries(panel):
    return [target["expr"] for target in panel["targets"]]


def test_every_metric_is_on_the_dashboard_and_no_other():
    assert {name for panel in PANELS for query in queries(panel) for name in NAME.findall(query)} == {
        *RUN_METRICS,
        *SITE_METRICS,
    }
    assert {name for variable in VARIABLES.values() for name in NAME.findall(variable["query"])} <= {
        *RUN_METRICS,
        *SITE_METRICS,
    }


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])
def test_a_panel_asks_for_one_kind_of_metrics_by_its_variable(panel):
    for target in panel["targets"]:
        [(kind, selected)] = re.findall(r"panfm_(run|site)_[a-z_]+\{([^}]*)\}", target["expr"])
        assert selected == f'{kind}=~"${kind}"'
        assert set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])) <= LABELS[kind]
    assert panel["datasource"]["uid"] == "${datasource}"


def test_panels_do_not_overlap_and_have_numbers_of_their_own():
    taken = [
        (x, y)
        for place in (panel["gridPos"] for panel in DASHBOARD["panels"])
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(taken) == len(set(taken))
    assert max(x for x, _ in taken) < 24
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])


def test_variables_are_those_that_the_queries_name():
    assert set(VARIABLES) == {"datasource", "run", "site"}
