"""Writes the tables of the benches: ratios with their bounds, `peers` and `scale`."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from simulations.documents.kept_results import KeptResult, short
from simulations.documents.markdown import cell, table

_ARMS = {
    "plain": "plain loop",
    "local": "**this project**, `local`",
    "ray": "**this project**, `ray`",
    "flower": "Flower 1.41, simulation",
    "pfl": "pfl-research 0.6",
    "nvflare": "NVFlare 2.9, simulator",
    "fedlab": "FedLab 1.3",
}


class _Bound(NamedTuple):
    """A ratio of a bench, and what it is to stay below."""

    words: str
    bound: float


_BOUNDS: Mapping[str, Mapping[str, _Bound]] = {
    "sgm-overhead": {
        "tiny/attention": _Bound("guided step over one with random masks, CPU: tiny, attention", 1.02),
        "tiny/value": _Bound("tiny, value", 1.03),
        "small/attention": _Bound("small, attention", 1.02),
        "small/value": _Bound("small, value", 1.03),
    },
    "round-overhead": {
        "local_over_plain": _Bound("federated round over plain loop", 1.05),
        "local_over_plain_cpu": _Bound("the same, CPU", 1.05),
    },
    "dex-step": {
        "dex_over_dense": _Bound("step of Director-Experts over dense", 1.35),
        "dex_over_naive": _Bound("the same over experts in a loop", 0.9),
    },
    "aggregate": {
        "ours_over_flower": _Bound("mean of updates over Flower's", 0.5),
        "ours_over_axpy": _Bound("the same over sums in place", 2.5),
        "peak_copies": _Bound("memory, copies of the model", 3.0),
    },
    "thousand-sites": {
        "over_pure": _Bound("round of a site over its training alone", 1.15),
        "over_pure_cpu": _Bound("the same, CPU", 1.15),
    },
    "dp-step": {
        "dense": _Bound("private over plain step, CPU: dense", 1.5),
        "dex": _Bound("experts", 2.6),
        "dense_memory": _Bound("memory: dense", 1.3),
        "dex_memory": _Bound("memory: experts", 1.3),
    },
    "local-step": {
        "over_dense": _Bound("masked step over one that computes all tokens", 0.55),
        "over_matmul": _Bound("the same over its matrix products", 1.4),
    },
    "deployment-overhead": {
        "worker_over_plain": _Bound("CPU of a message, worker over torch in the ClientApp", 0.4),
        "worker_over_echo": _Bound("the same over Flower's floor", 1.3),
    },
}
"""Bench -> name of a ratio -> its bound."""
_SIZES = ("turns", "cycles", "processes", "repeats", "rounds", "sites", "batch")
_PROJECTION = {
    "parameters": "parameters that travel, million",
    "megabytes_up": "MB from a site in a round, float32 (int8: a quarter)",
    "gigabytes_round": "GB through the coordinator in a round, both ways",
    "site_link_seconds": "seconds on a site's link of 100 Mbit/s, both ways",
    "coordinator_link_seconds": "seconds on the coordinator's link of 1 Gbit/s, both ways",
    "core_seconds_per_patient": "CPU seconds of a step per patient, one core, measured",
    "steps_per_round": "steps of 32 in a round (a tenth of a pass)",
    "core_hours_per_round": "hours of a round on one such core",
    "server_gib": "GiB that the server fills while it averages",
    "step_gib": "GiB of a step of 32 at a site, at most",
    "private_state_gib": "GiB of a site's private state after a round",
    "images_tb": "TB of a site's preprocessed images in float32",
    "images_tb_uint8": "TB of the same in uint8",
    "features_tb": "TB of their patch features (statistics of blocks), which lie in memory",
}


def _peers(kept: KeptResult) -> str:
    sizes = sorted({metric.partition("/")[0] for metric in kept.metrics}, key=int)
    head = ["CPU of a round over plain training (CPU s; wall s and peak MiB of the whole run)"]
    head += [f"{size} MB" for size in sizes]
    rows = [(_ARMS[arm], *(_peer(kept, size, arm) for size in sizes)) for arm in _ARMS if arm in kept.arms]
    missing = "".join(f"* Not measured: {_ARMS[arm]}. It {cell(reason)}\n" for arm, reason in kept.absent.items())
    return f"Commit {kept.commit}.\n\n{table(head, rows)}" + (f"\n{missing}" if missing else "")


def _peer(kept: KeptResult, size: str, arm: str) -> str:
    if not (taken := kept.of(f"{size}/cpu_per_round", arm)):
        return ""
    (ratio,) = kept.of(f"{size}/over_plain", arm)
    wall, peak = kept.of(f"{size}/seconds", arm)[0], kept.of(f"{size}/peak_mib", arm)[0]
    return f"{short(ratio, 2)} ({taken[0]:.1f}; {wall:.0f}, {peak:,.0f})"


def _projection(kept: KeptResult) -> str:
    rows = []
    for name, text in _PROJECTION.items():
        value = kept.of(f"projection/{name}", "ViT-B")[0]
        rows.append((text, f"{value / 1e6 if name == 'parameters' else value:,.3g}"))
    return f"Commit {kept.commit}.\n\n{table(('ViT-B, 20 sites of 50,000 patients', 'value'), rows)}"


def _exponents(kept: KeptResult) -> str:
    rows = []
    for metric in (metric for metric in kept.metrics if metric.endswith("/seconds")):
        arms = sorted((arm for arm in kept.arms if kept.of(metric, arm)), key=float)
        sizes, costs = np.log([float(arm) for arm in arms]), np.log([np.median(kept.of(metric, arm)) for arm in arms])
        slopes = (np.polyfit(sizes, costs, 1)[0], np.polyfit(sizes[-2:], costs[-2:], 1)[0])
        rows.append(
            (
                metric.removesuffix("/seconds"),
                "; ".join(f"{float(arm):,.0f}" for arm in arms),
                *(short(float(slope), 2) for slope in slopes),
            )
        )
    return table(("what grows", "values", "exponent", "between the two largest"), rows)


COST_TABLES: Mapping[str, Mapping[str, Callable[[KeptResult], str]]] = {
    "peers": {"peers": _peers},
    "scale": {"scale-exponents": _exponents, "scale-projection": _projection},
}
"""Bench -> name of a table -> function that writes it."""


def bounds_table(data: Path) -> str:
    """Write a row per ratio: the kept result of its bench (`bench-<name>.json`), and the bound."""
    rows = []
    for bench, ratios in _BOUNDS.items():
        path = data / f"bench-{bench}.json"
        kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
        first = f"`{bench}`" + (f" ({_size(kept['config'])}; {kept['commit'][:12]})" if kept else "")
        for name, (words, bound) in ratios.items():
            rows.append(
                (first, words, _against(kept["ratios"][name], bound) if kept else "**Not measured yet**", f"{bound:g}")
            )
            first = ""
    return table(("bench (size; commit)", "ratio", "measured", "bound"), rows)


def _size(config: Mapping[str, Any]) -> str:
    return ", ".join(f"{config[name]:,} {name}" for name in _SIZES if isinstance(config.get(name), int))


def _against(value: float, bound: float) -> str:
    return short(value) if value <= bound else f"**{short(value)}**"
