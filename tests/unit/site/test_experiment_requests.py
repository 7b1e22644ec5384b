"""Descriptions of the experiments that have asked a site."""

import os

from panfm.config import experiment_hash, parse_run
from panfm.site.experiment_requests import keep_request, read_requests
from tests.unit.site.test_site import RUN


def keep(state_dir, seed: int, decided=()) -> str:
    run = parse_run(RUN.replace("seed = 3", f"seed = {seed}"))
    keep_request(state_dir, run, experiment := experiment_hash(run), decided)
    path = state_dir / "requests" / f"{experiment}.toml"
    if path.stat().st_mtime > 1e9:
        os.utime(path, (seed, seed))
    return experiment


def test_a_description_is_kept_once_as_sites_are_sent_it(tmp_path):
    experiment = keep(tmp_path, 3)
    assert keep(tmp_path, 3) == experiment
    [request] = read_requests(tmp_path)
    assert (request.experiment, request.asked) == (experiment, 3)
    assert experiment_hash(request.read()) == experiment


def test_a_file_that_was_changed_is_left_out_and_written_anew(tmp_path):
    keep(tmp_path, 3)
    [request] = read_requests(tmp_path)
    request.path.write_text(request.path.read_text().replace("rounds = 6", "rounds = 2"))
    assert read_requests(tmp_path) == []
    keep(tmp_path, 3)
    assert request.read().train.rounds == 6


def test_twenty_that_wait_are_kept_and_all_that_are_decided(tmp_path):
    decided = [keep(tmp_path, seed) for seed in range(1, 4)]
    waiting = [keep(tmp_path, seed, decided) for seed in range(10, 35)]
    assert [request.experiment for request in read_requests(tmp_path)] == decided + waiting[-20:]
