"""Cox models: the loss by hand, the concordance as a plain loop has it, and a site with times."""

import csv
import json

import numpy as np
import pytest
import torch

import panfm
from panfm.errors import DataError
from panfm.evaluate.scores import draw_counts
from panfm.finetune.finetune_job import FinetuneJob
from panfm.finetune.survival import concordance, cox_loss, fit_cox
from tests.cases import quick


def test_the_loss_by_hand():
    """At the first event three patients are at risk, with hazards 2, 1, 1; at the second event one."""
    hazards, events, times = torch.tensor([2.0, 1.0, 1.0]), torch.tensor([1.0, 0.0, 1.0]), torch.tensor([1.0, 2.0, 3.0])
    assert cox_loss(hazards.log(), events, times).item() == pytest.approx(np.log(2.0) / 2)
    shifted = cox_loss(hazards.log() + 7.0, events, times)
    assert shifted.item() == pytest.approx(np.log(2.0) / 2, abs=1e-6)


def test_a_batch_without_an_event_teaches_nothing():
    log_hazards = torch.zeros(3, requires_grad=True)
    loss = cox_loss(log_hazards, torch.zeros(3), torch.tensor([1.0, 2.0, 2.0]))
    loss.backward()
    assert loss.item() == 0.0
    assert not log_hazards.grad.any()


def test_concordance_as_a_loop_has_it():
    random = np.random.default_rng(0)
    risks, times = random.integers(0, 4, 20).astype(float), random.integers(1, 9, 20).astype(float)
    events, counts = random.random(20) < 0.6, draw_counts(20, 3, 0)
    for row, value in zip(counts, concordance(risks, events, times, counts), strict=True):
        who = np.repeat(np.arange(20), row.astype(int))
        pairs = [(one, other) for one in who for other in who if events[one] and times[one] < times[other]]
        won = [1.0 if risks[a] > risks[b] else 0.5 if risks[a] == risks[b] else 0.0 for a, b in pairs]
        assert value == pytest.approx(np.mean(won))
    assert np.isnan(concordance(risks, np.zeros(20, bool), times, counts)).all()


@pytest.mark.parametrize("features", quick([60, 3], 1))
def test_a_regression_learns_who_is_at_risk(features):
    random = np.random.default_rng(1)
    values = random.normal(size=(80, features))
    times = random.exponential(np.exp(-1.5 * values[:, 0]))
    events = (random.random(80) < 0.7).astype(float)
    fitted = fit_cox(values[:50], events[:50], times[:50])
    assert concordance(fitted.risks(values[50:]), events[50:] == 1.0, times[50:], np.ones((1, 30)))[0] > 0.6
    with pytest.raises(DataError, match="50 patients with 0 events, expected at least 10 with an event"):
        fit_cox(values[:50], np.zeros(50), times[:50])


def add_times(site, change=lambda number: number):
    """Adds `death` and `days`: patients with bright cubes die early."""
    path = site / "labels.csv"
    rows = list(csv.DictReader(path.read_text().splitlines()))
    lines = ["subject,death,days"]
    for number, row in enumerate(rows):
        is_bright = row["bright"] == "yes"
        lines.append(f"{row['subject']},{int(is_bright or number % 3 == 0)},{change(100 - 60 * is_bright + number)}")
    path.write_text("\n".join(lines) + "\n")


@pytest.fixture
def model(make_run, write_run):
    return write_run(make_run())


@pytest.mark.slow
def test_a_site_with_times(model, labelled_site, settings_of, tmp_path):
    site = labelled_site(patients=24)
    add_times(site)
    settings = settings_of(model, site, "labels.csv:death", time="days", steps=20, batch_size=12, validate_every=10)
    result = FinetuneJob.open(settings, tmp_path / "out").run()
    assert {score.arm for score in result.scores} == {"fine-tuned", "knn", "linear-probe"}
    assert {score.metric for score in result.scores} == {"c-index"}
    assert set(result.streams) <= {"brain-mr"}
    tuned = panfm.load(tmp_path / "out")
    assert (tuned.task.kind, tuned.task.time, tuned.task.outputs) == ("survival", "days", ("death",))
    assert tuned.predict({"brain-mr": site / "clinic-1-only.nii.gz"}).shape == (1, 1)
    assert json.loads((tmp_path / "out" / "model" / "metadata.json").read_text())["task"] == "death"


@pytest.mark.parametrize(
    ("task", "change", "told"),
    [
        ("labels.csv:days", lambda days: days, "days: found number, expected an event that is yes or no, for --time"),
        ("labels.csv:death", lambda days: -days, "days: found a time below 0, expected time since the image"),
        ("labels.csv:death", lambda days: days % 2, "days: found yes-no, expected a number of days, months or years"),
        ("labels.csv:death", lambda days: "late" if days < 50 else days, r"found ignore \(days: .* without a number"),
    ],
)
def test_mistakes_in_times(model, labelled_site, settings_of, tmp_path, task, change, told):
    site = labelled_site()
    add_times(site, change)
    with pytest.raises(DataError, match=told):
        FinetuneJob.open(settings_of(model, site, task, time="days"), tmp_path / "out")
