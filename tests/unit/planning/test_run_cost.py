"""Formulas of a run's cost, by hand."""

import math

import pytest

from panfm.planning import run_cost


def test_a_site_sends_the_groups_that_its_streams_train():
    sizes = {"backbone": 100, "stream:brain-mr": 10, "stream:heart-mr": 1}
    sent = run_cost.bytes_up(sizes, {"a": ["brain-mr"], "b": ["brain-mr", "heart-mr"], "c": []})
    assert sent == {"a": 440, "b": 444, "c": 400}
    assert run_cost.bytes_up(sizes, {}) == {}


def test_sites_of_one_machine_take_turns():
    assert run_cost.round_seconds(0.5, 20) == 10.0
    assert run_cost.round_seconds(0.5, 20, sites_in_turn=3) == 30.0


@pytest.mark.parametrize(("patients", "steps"), [(0, 0), (1, 1), (32, 1), (33, 2), (50_000, 1563)])
def test_every_patient_is_drawn_once(patients, steps):
    assert run_cost.steps_of(patients, 32) == steps


def test_bytes_over_a_link():
    assert run_cost.link_seconds(12.5e6, 100.0) == pytest.approx(1.0)


def test_a_server_holds_three_copies_and_signs():
    assert run_cost.server_memory_bytes(1000) == 13_000


def test_images_and_features_of_subjects(make_run):
    run = make_run()
    voxels = sum(stream.channels * math.prod(stream.shape) for stream in run.streams.values())
    assert run_cost.image_bytes(run.streams, 3) == 12 * voxels
    assert run_cost.image_bytes(run.streams, 3, per_voxel=1) == 3 * voxels
    assert run_cost.feature_bytes(run, 6) == 2 * run_cost.feature_bytes(run, 3) > 0
