"""Computes the CPUs and the share of a GPU that Flower's simulation reserves for each site."""

import os
from collections.abc import Sequence

import torch

from panfm.config import load_run
from panfm.models.sizes import sizes_of
from simulations.engines.job import Job

_USABLE = 0.9
"""Share of a GPU's memory that sites may fill."""


def site_resources(job: Job) -> dict[str, float]:
    """CPUs and share of a GPU for each site of a job; no GPU where PyTorch shows none."""
    step_bytes = sizes_of(load_run(job.run_dir / "run.toml")).step_bytes
    return {"num_cpus": 1, "num_gpus": gpu_share(step_bytes, job.num_sites, os.cpu_count() or 1, _gpu_bytes())}


def gpu_share(step_bytes: int, num_sites: int, num_cpus: int, gpu_bytes: Sequence[int]) -> float:
    """Share of a GPU for each site: as many sites at once as the CPUs allow, on one GPU no more than fit its memory.

    Args:
        step_bytes: Bytes of a local step, counted generously.
        gpu_bytes: Memory of each GPU.
    """
    if not gpu_bytes:
        return 0.0
    at_once = min(num_sites, num_cpus)
    on_one = min(-(-at_once // len(gpu_bytes)), int(_USABLE * min(gpu_bytes) // max(step_bytes, 1)))
    return int(10_000 / max(on_one, 1)) / 10_000  # Ray counts in ten-thousandths


def _gpu_bytes() -> list[int]:
    devices = range(torch.cuda.device_count())
    return [torch.cuda.get_device_properties(device).total_memory for device in devices]
