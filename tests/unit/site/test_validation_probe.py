"""The probe of a site's own labels after a round: which columns, of whom, how often, and what it changes."""

from dataclasses import replace

import numpy as np
import pytest
import tomli_w
import torch

from panfm.data.cache import open_store
from panfm.evaluate.embed import embed_store
from panfm.evaluate.site_score import probed, scored
from panfm.models import build_model
from panfm.models.packing import trained_manifest
from panfm.site import Site
from tests.unit.site.test_site import same, task

OLD = [1, 0, 0, 1, 1, 0, 1, 0, 1, 0, 0, 1]
PROBE = '[probe.tasks]\nage = ["old"]\n'
OPEN = {"may-leave": ["updates", "counts", "monitors", "evaluation"], "evaluation-labels": ["old"]}


@pytest.fixture
def labelled(tmp_path, write_site):
    """Makes a site of 12 patients with a label, the last four of whom are for validation."""

    def make(name="alpha", old=tuple(OLD), **limits):
        folder = write_site(tmp_path / name, "alpha", ("brain", "heart"), subjects=12)
        hold_out(folder, range(8, 12))
        cells = [f"alpha-{number},{value}" for number, value in enumerate(old)]
        (folder / "labels.csv").write_text("\n".join(["subject,old", *cells]) + "\n")
        table = {"smallest-batch": 1, "smallest-steps": 1} | OPEN | limits
        (folder / "site.toml").write_text(tomli_w.dumps({"name": "alpha", "labels": "labels.csv", "limits": table}))
        return Site(folder)

    return make


def hold_out(folder, numbers):
    """Put some of a site's patients into the val split, and the others into the train split."""
    lines = (folder / "manifest.csv").read_text().splitlines()
    is_val = {f"alpha-{number}" for number in numbers}
    rows = [line.rpartition(",")[0] + (",val" if line.split(",")[0] in is_val else ",train") for line in lines[1:]]
    (folder / "manifest.csv").write_text("\n".join([lines[0], *rows]) + "\n")


def trained_model(site, reply, asked):
    """The model with all streams of the run as a site has trained it in a round, and the run."""
    run = site._session(asked.run_toml).run
    own = build_model(run, ["brain-mr", "heart-mr"])
    flat = {group: asked.groups[group] + update for group, update in reply.updates.items()}
    tensors = trained_manifest(own, run.sharing).unpack_all(flat)
    model = build_model(run)
    model.load_state_dict({**model.state_dict(), **{name: torch.from_numpy(array) for name, array in tensors.items()}})
    return model, run


def monitors(site, number=1, extra=PROBE, run_id="run-1"):
    return site.train_round(task(number, extra=extra, run_id=run_id)).monitors


def test_it_is_the_auc_of_a_ridge_probe_of_the_trained_model(labelled):
    site, asked = labelled(), task(extra=PROBE)
    reply = site.train_round(asked)
    whole, run = trained_model(site, reply, asked)
    features = embed_store(whole, open_store(site.folder, run.streams), np.arange(12), batch_size=3)
    truth = np.array(OLD, float)[:, None]
    expected = scored(probed(features, truth, np.arange(8))[8:], truth[8:], is_number=False, is_held_out=True)
    assert reply.monitors["validation-auc"] == expected.value


def test_it_changes_nothing_of_the_round(labelled):
    with_probe, without = labelled(), labelled("beta", **{"evaluation-labels": []})
    for number in (1, 2):
        one, other = (site.train_round(task(number, extra=PROBE)) for site in (with_probe, without))
        assert "validation-auc" in one.monitors
        assert "validation-auc" not in other.monitors
        one.monitors.pop("validation-auc")
        assert same(one, other)


@pytest.mark.parametrize(
    "limits",
    [
        {"evaluation-labels": []},
        {"evaluation-labels": ["other"]},
        {"may-leave": ["updates", "counts", "monitors"], "evaluation-labels": []},
        {"may-leave": ["updates", "counts", "evaluation"]},
        {"smallest-batch": 3},
    ],
)
def test_nothing_is_told_without_the_operator_or_of_few_patients(labelled, limits):
    """Two of the four validation patients have the label: fewer than three."""
    assert "validation-auc" not in monitors(labelled(**limits))


@pytest.mark.parametrize("old", [[1] * 12, [40.5 + number for number in range(12)], [""] * 12, OLD[:8] + [""] * 4])
def test_nothing_is_told_of_labels_that_cannot_be_scored(labelled, old):
    assert "validation-auc" not in monitors(labelled(old=tuple(old)))


def test_nothing_is_told_of_labels_that_the_run_does_not_name(labelled):
    assert "validation-auc" not in monitors(labelled(), extra="")


def test_rounds_that_do_not_validate_have_none(labelled):
    site = labelled()
    told = []
    for number in (1, 2, 3):
        asked = task(number, extra=PROBE)
        asked = replace(asked, run_toml=asked.run_toml.replace("validate-every = 1", "validate-every = 2"))
        told.append("validation-auc" in site.train_round(asked).monitors)
    assert told == [False, True, False]


def test_a_server_is_told_of_as_many_models_as_the_limit_says(labelled):
    site = labelled(evaluations=2)
    told = ["validation-auc" in monitors(site, number) for number in (1, 2, 2, 3)]
    assert told == [True, True, True, False]


def test_other_patients_or_labels_get_no_second_answer(labelled):
    site = labelled()
    assert "validation-auc" in monitors(site)
    (site.folder / "labels.csv").write_text((site.folder / "labels.csv").read_text().replace("alpha-9,0", "alpha-9,1"))
    assert "validation-auc" not in monitors(site, 2)


@pytest.mark.parametrize("cell", ["yes", "1;0"])
def test_a_table_that_cannot_be_read_costs_no_round(labelled, cell):
    site = labelled(old=(cell, *OLD[1:]))
    reply = site.train_round(task(extra=PROBE))
    assert "validation-auc" not in reply.monitors
    assert reply.updates
    assert reply.monitors


def test_a_label_that_nobody_has_hides_no_other(labelled):
    both = '[probe.tasks]\nage = ["old", "frail"]\n'
    site = labelled(**{"evaluation-labels": ["old", "frail"]})
    (site.folder / "labels.csv").write_text(
        "\n".join(["subject,old,frail", *(f"alpha-{number},{value}," for number, value in enumerate(OLD))]) + "\n"
    )
    assert monitors(site, extra=both)["validation-auc"] == monitors(labelled("beta"))["validation-auc"]
