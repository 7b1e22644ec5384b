"""Evaluation of a finished run's model at three small hospitals, in process: the scores, the file, and the report."""

import json

import numpy as np
import pytest
import tomli_w

from panfm.data.cache import open_store
from panfm.errors import DataError
from panfm.evaluate.embed import embed_store, load_model
from panfm.evaluate.site_score import cross_validated, scored
from panfm.report.report_page import render, write_report
from panfm.report.run_files import read_run
from panfm.report.site_evaluation import read_evaluation
from simulations.engines.job import Job
from simulations.engines.local import run as run_local
from tests.federation.conftest import LIMITS, TASKS

NAMES = {"alpha": ["old", "round"], "beta": ["round"], "gamma": "all"}


def evaluate(federation, run_dir, *columns):
    run_local(Job(federation.sites, run_dir, columns))


@pytest.fixture
def finished(labelled):
    """A run of one round at sites of which beta names another column than the others."""
    run_dir = labelled.run("run", "train.rounds=1", TASKS)
    for name, columns in NAMES.items():
        limits = {**LIMITS, "may-leave": [*LIMITS["may-leave"], "evaluation"], "evaluation-labels": columns}
        text = tomli_w.dumps({"name": name, "labels": "labels.csv", "limits": limits})
        (labelled.sites / name / "site.toml").write_text(text)
    return run_dir


@pytest.mark.slow
def test_each_site_scores_the_model_on_the_columns_that_its_operator_names(labelled, finished):
    model_bytes = (finished / "model" / "model.safetensors").read_bytes()
    rounds, events = ((finished / name).read_bytes() for name in ("rounds.jsonl", "events.jsonl"))
    write_report(read_run(finished))
    evaluate(labelled, finished, "old")
    evaluate(labelled, finished, "round")
    columns = read_evaluation(finished).columns
    assert (list(columns["old"].sites), list(columns["round"].sites)) == (["alpha", "gamma"], ["alpha", "beta"])
    refusal = "LimitError: this site's limits.evaluation-labels lacks 'old', its operator may add it"
    assert columns["old"].left_out == {"beta": refusal}
    reason = "LimitError: evaluation: 'round': too few patients of this site have such a label, or it is none"
    assert columns["round"].left_out == {"gamma": reason}
    store = open_store(labelled.sites / "alpha", labelled.describe().streams)
    at = store.indices("train")
    table = np.genfromtxt(labelled.sites / "alpha" / "labels.csv", delimiter=",", skip_header=1)
    truth = table[at, 1:2]
    features = embed_store(load_model(finished / "model")[0], store, at, batch_size=3)
    expected = scored(cross_validated(features, truth), truth, is_number=False, is_held_out=False)
    told = columns["old"].sites["alpha"]
    assert (told.metric, told.value, told.low, told.high) == ("auc", expected.value, expected.low, expected.high)
    assert (told.patients, told.held_out) == (len(at), False)
    assert f"AUC {told.value:.2f} [{told.low:.2f}, {told.high:.2f}]" in (finished / "report.html").read_text()
    assert "beta: LimitError" in render(read_run(finished))
    assert (finished / "model" / "model.safetensors").read_bytes() == model_bytes
    assert [(finished / name).read_bytes() for name in ("rounds.jsonl", "events.jsonl")] == [rounds, events]
    assert not (finished / "ended.json").exists()


@pytest.mark.slow
def test_a_run_without_a_model_is_not_evaluated_and_the_file_says_so(labelled):
    job = labelled.job("fresh")
    with pytest.raises(DataError, match=r"fresh/model: expected the model of a finished run"):
        evaluate(labelled, job.run_dir, "old")
    assert "expected the model of a finished run" in read_evaluation(job.run_dir).failure
    assert json.loads((job.run_dir / "evaluation.json").read_text())["columns"] == {}
