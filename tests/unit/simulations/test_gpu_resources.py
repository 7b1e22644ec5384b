"""How Flower's simulation puts sites on GPUs."""

import pytest

from simulations.engines.resources import gpu_share

GIB = 2**30


@pytest.mark.parametrize(
    ("step_gib", "sites", "cpus", "gpus", "share"),
    [
        (1, 8, 2, [], 0.0),
        (1, 1, 16, [80], 1.0),
        (1, 2, 16, [80], 0.5),
        (1, 3, 16, [80], 0.3333),
        (1, 8, 16, [80, 80], 0.25),
        (1, 8, 4, [80, 80], 0.5),
        (1, 2, 16, [80] * 8, 1.0),
        (30, 8, 16, [80], 0.5),
        (200, 8, 16, [80], 1.0),
        (30, 8, 16, [80, 40], 1.0),
    ],
)
def test_sites_share_gpus_by_cpus_and_memory(step_gib, sites, cpus, gpus, share):
    found = gpu_share(step_gib * GIB, sites, cpus, [size * GIB for size in gpus])
    assert found == share
