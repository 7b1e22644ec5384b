"""A site with `limits.devices` above 1 trains a round in several processes and makes one reply."""

import multiprocessing
import os
import signal

import numpy as np
import pytest

from panfm.config import dump_toml, parse_run
from panfm.errors import LimitError, PanfmError
from panfm.models import build_model
from panfm.sharing.groups import GroupManifest
from panfm.sharing.messages import RoundTask
from panfm.site import Site

RUN = """
name = "small"
seed = 3
sharing.coding = "float32"
[streams]
brain-mr = { spacing-mm = [8.0, 8.0, 8.0], shape = [8, 8, 8], patch = [4, 4, 8] }
heart-mr = { spacing-mm = [8.0, 8.0, 8.0], shape = [8, 8, 8], patch = [4, 4, 8] }
[train]
rounds = 6
local-steps = 2
batch-size = 3
"""


def task(round_number: int, extra: str = "") -> RoundTask:
    run = parse_run(RUN + extra)
    model = build_model(run)
    tensors = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    groups = GroupManifest.of(model.parameter_groups(), tensors).pack_all(tensors)
    return RoundTask("run-1", round_number, dump_toml(run), groups)


def site(folder, write_site, devices: int) -> Site:
    return Site(write_site(folder, "alpha", ("brain", "heart"), extra=f"[limits]\ndevices = {devices}\n"))


@pytest.mark.slow
def test_the_reply_is_that_of_one_device_and_an_ended_process_is_started_again(tmp_path, write_site):
    """Up to rounding: AdamW turns a gradient near 0 into a step of either sign, so single numbers may differ more."""
    one, two = (site(tmp_path / str(devices), write_site, devices) for devices in (1, 2))
    for round_number in (1, 2, 3):
        expected, found = (each.train_round(task(round_number)) for each in (one, two))
        assert len(multiprocessing.active_children()) == 1
        assert found.weights == expected.weights
        assert found.loss == pytest.approx(expected.loss, abs=1e-4)
        assert found.saliency == pytest.approx(expected.saliency, abs=1e-4)
        for group, values in expected.updates.items():
            distance = np.abs(found.updates[group] - values)
            assert np.median(distance) < 1e-6, group
        if round_number == 2:
            [child] = multiprocessing.active_children()
            os.kill(child.pid, signal.SIGKILL)
            child.join()
            with pytest.raises(PanfmError, match=r"limits\.devices: one of the site's processes has ended"):
                two.train_round(task(3))
    two._warm[1].trainer._processes.close()
    assert multiprocessing.active_children() == []


def test_a_run_that_cannot_be_split_is_refused_before_its_images_are_read(tmp_path, write_site):
    views = '[objective]\nname = "views"\n[augment]\nnoise = 0.1\n'
    with pytest.raises(LimitError, match=r"objective\.name: views couples .* limits\.devices is 2"):
        site(tmp_path / "a", write_site, 2).train_round(task(1, views))
