"""Writes the tables of docs/results that are made from kept result files, between marks of their pages.

A page has `<!-- made: NAME -->`, the table, and `<!-- end -->`; `python -m simulations.documents figures` writes the
table anew. A study whose result file is not there has a sentence in the table's place.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from simulations.documents.cost_tables import COST_TABLES, bounds_table
from simulations.documents.kept_results import KeptResult, by_seed, short, signed, with_spread
from simulations.documents.markdown import table
from simulations.documents.phantom_tables import PHANTOM_TABLES
from simulations.documents.study_tables import STUDY_TABLES, measured_at, targets

_MARKED = re.compile(r"(<!-- made: ([\w-]+) -->\n\n).*?(\n<!-- end -->)", re.DOTALL)
_PERCENTS = (5, 20, 100)
_NOT_MEASURED = "**Not measured yet** on reported seeds: no result file is kept.\n"
_DEMO_METRICS = {
    "auc": "all labels",
    "auc_100": "labels of 100 patients",
    "auc_missing_1": "one organ missing",
    "auc_missing_3": "three organs missing",
}
_DEMO_ARMS = ("federated", "best-site", "untrained", "statistics", "tokenizer")


def tables(data: Path) -> dict[str, str]:
    """Write every table from the result files of a folder; return name -> Markdown."""
    written = {"bounds": bounds_table(data)}
    for study, parts in _PARTS.items():
        path = data / f"{study}.json"
        kept = KeptResult.read(path) if path.exists() else None
        written |= {name: write(kept) if kept else _NOT_MEASURED for name, write in parts.items()}
    return written


def filled(text: str, written: Mapping[str, str]) -> str:
    """Replace what stands between the marks of a page. Raises KeyError for the name of no table."""
    return _MARKED.sub(lambda marked: f"{marked[1]}{written[marked[2]]}{marked[3]}", text)


def marks(text: str) -> list[str]:
    """Names of the tables that a page has marks for."""
    return [marked[2] for marked in _MARKED.finditer(text)]


def _demo(kept: KeptResult) -> str:
    alone = [arm for arm in kept.arms if arm.startswith("site:")]
    alone.sort(key=lambda arm: -np.mean(kept.of("auc", arm)))
    rows = []
    for arm in (*_DEMO_ARMS, *alone):
        cells = []
        for metric in _DEMO_METRICS:
            values = kept.of(metric, arm)
            draws = f" ({' '.join(map(short, values))})" if metric in ("auc", "auc_100") and arm in _DEMO_ARMS else ""
            cells.append(f"{short(float(np.mean(values)))}{draws}")
        rows.append((f"{arm.removeprefix('site:')} alone" if arm in alone else arm, *cells))
    return table(("arm", *_DEMO_METRICS.values()), rows)


def _demo_differences(kept: KeptResult) -> str:
    rows = []
    for baseline in _DEMO_ARMS[1:]:
        gains = kept.gains(["auc", "auc_100"], "federated", baseline)
        rows.append((baseline, *(f"{signed(float(row.mean()))} ({by_seed(row)})" for row in gains)))
    return table(("federated minus", "all labels", "labels of 100 patients"), rows)


def _pictures(kept: KeptResult, arms: Sequence[str]) -> str:
    all_seeds = len(kept.seeds())
    numbers = {arm: len(kept.seeds(arm)) for arm in arms}
    head = [arm if numbers[arm] == all_seeds else f"{arm} ({numbers[arm]} seeds)" for arm in arms]
    streams = dict.fromkeys(metric[4:].rpartition("_")[0] for metric in kept.metrics if metric.startswith("auc_"))
    groups = {**{f"auc_{name}": name for name in streams if name != "mean"}, "auc_mean": "mean"}
    groups |= {metric.rpartition("_")[0]: _held_out(metric) for metric in kept.metrics if metric.startswith("heldout_")}
    rows = []
    for group, name in groups.items():
        for percent in _PERCENTS:
            label = f"{name}, {percent} %" if percent == _PERCENTS[0] else f"{percent} %"
            rows.append((label, *(with_spread(kept.of(f"{group}_{percent}", arm)) for arm in arms)))
    return table(("stream, share of labels", *head), rows)


def _held_out(metric: str) -> str:
    return f"{metric.removeprefix('heldout_').rpartition('_')[0]} at no site"


def _last_block(kept: KeptResult) -> str:
    return _pictures(kept, [arm for arm in kept.arms if not arm.endswith("-readout")])


def _readout(kept: KeptResult) -> str:
    return _pictures(kept, [arm for arm in kept.arms if arm.endswith("-readout")])


def _cells(kept: KeptResult, prefix: str = "auc_") -> list[str]:
    """Metrics of one stream at one share of labels."""
    return [metric for metric in kept.metrics if metric.startswith(prefix) and not metric.startswith("auc_mean_")]


def _worst_stream(kept: KeptResult, arm: str, baseline: str) -> tuple[str, float]:
    streams = dict.fromkeys(metric.rpartition("_")[0] for metric in _cells(kept))
    means = {
        stream.removeprefix("auc_"): float(
            kept.gains([f"{stream}_{percent}" for percent in _PERCENTS], arm, baseline).mean()
        )
        for stream in streams
    }
    worst = min(means, key=means.__getitem__)
    return worst, means[worst]


def _picture_differences(kept: KeptResult) -> str:
    from simulations.studies.real_pictures_study import COMPARED

    rows = []
    for arm, baseline in COMPARED:
        gains = kept.gains(_cells(kept), arm, baseline) if {arm, baseline} <= {*kept.arms} else np.empty(0)
        if not gains.size:
            continue
        stream, worst = _worst_stream(kept, arm, baseline)
        there = kept.gains(_cells(kept, "heldout_"), arm, baseline)
        rows.append((
            f"{arm} minus {baseline}", signed(float(gains.mean()), 4), by_seed(gains.mean(axis=0), 4),
            f"{stream} {signed(worst, 4)}", f"{int((gains >= 0).sum())} of {gains.size}",
            f"{signed(float(there.mean()), 4)}{_fewer(there, kept)}" if there.size else "",
        ))  # fmt: skip
    head = ("difference", "mean over cells", "by seed", "worst stream", "cells not behind", "stream at no site")
    return table(head, rows)


def _picture_targets(kept: KeptResult) -> str:
    from simulations.studies.real_pictures_study import TARGETS

    rows = []
    for claim, name, least in TARGETS:
        place, _, pair = name.partition("/")
        arm, minus, baseline = pair.partition("-minus-")
        if not minus or not {arm, baseline} <= {*kept.arms}:
            continue
        gains = kept.gains(_cells(kept, "heldout_" if place == "heldout" else "auc_"), arm, baseline)
        shown = "not measured"
        if gains.size:
            value = _worst_stream(kept, arm, baseline)[1] if place == "worst-stream" else float(gains.mean())
            shown = f"{signed(value, 5)}: {_verdict(value, least)}{_fewer(gains, kept)}"
        rows.append((claim, signed(least, 4), shown))
    return table(("target", "at least", "measured"), rows)


def _fewer(gains: NDArray[np.float64], kept: KeptResult) -> str:
    """Name the number of seeds of some differences [metrics, seeds], if there are fewer than the study has."""
    seeds = gains.shape[1]
    return f" ({seeds} seeds)" if seeds < len(kept.seeds()) else ""


def _verdict(value: float, least: float) -> str:
    return "met" if value >= least else "**missed**"


def _rounds_kept(kept: KeptResult) -> str:
    names = {"rounds_kept": "", "rounds_kept_heldout": ", ultrasound at no site"}
    told = [
        f"`{arm}`{where} {' '.join(f'{value:g}' for value in kept.of(metric, arm))}"
        for metric, where in names.items()
        for arm in kept.arms
        if kept.of(metric, arm) and arm in _GATED
    ]
    return f"Rounds after which the model is kept, by seed (0 is the start): {'; '.join(told)}.\n"


_GATED = ("adapted", "adapted-attention")
_DEX_ROWS = {
    "own": "a site's own modality",
    "own_director": "the same through the directors",
    "heldout": "held-out modality, through the directors",
}


def _dex_pictures(kept: KeptResult) -> str:
    rows = []
    for family, name in _DEX_ROWS.items():
        for percent in _PERCENTS:
            label = f"{name}, {percent} %" if percent == _PERCENTS[0] else f"{percent} %"
            rows.append((label, *(with_spread(kept.of(f"{family}_{percent}", arm)) for arm in kept.arms)))
    megabytes = [np.mean(kept.of("bytes_round", arm)) / 1e6 for arm in kept.arms]
    rows.append(("MB a round", *("" if np.isnan(value) else f"{value:.2f}" for value in megabytes)))
    return f"{measured_at(kept)}\n{table(('AUC, share of labels', *kept.arms), rows)}\n{_dex_differences(kept)}"


def _dex_differences(kept: KeptResult) -> str:
    rows = []
    for arm, baseline in _dex_pairs(kept.arms):
        cells = []
        for family in ("own", "heldout"):
            gains = kept.gains([f"{family}_{percent}" for percent in _PERCENTS], arm, baseline)
            cells.append(f"{signed(float(gains.mean()), 4)} ({by_seed(gains.mean(axis=0), 4)})")
        rows.append((f"{arm} minus {baseline}", *cells))
    head = ("difference, mean over shares of labels (by seed)", "own modality", "held-out modality")
    return table(head, rows)


def _dex_pairs(arms: Sequence[str]) -> Iterator[tuple[str, str]]:
    for arm in arms:
        for baseline in ("start", "dense", "local"):
            if baseline in arms and arm not in ("start", baseline):
                yield arm, baseline


_PAN_FM_METRICS = {
    "auc": "all organs",
    **{f"auc_missing_{number}": f"{number} missing" for number in range(1, 7)},
    "auc_missing": "missing, mean",
}
_PAN_FM_LABELS = ("federated", "centralised", "single-organ-best", "late-fusion", "mean-imputation", "supervised")
"""Arms whose AUC is shown label by label."""


def _pan_fm(kept: KeptResult) -> str:
    rows = [(arm, *_means(kept, arm, _PAN_FM_METRICS)) for arm in kept.arms]
    return f"{measured_at(kept)}\n{table(('AUC', *_PAN_FM_METRICS.values()), rows)}"


def _pan_fm_differences(kept: KeptResult) -> str:
    rows = []
    for arm in kept.arms:
        if arm != "federated":
            gains = kept.gains(["auc", "auc_missing"], "federated", arm)
            rows.append((arm, *(f"{signed(float(row.mean()))} ({by_seed(row)})" for row in gains)))
    return table(("federated minus", "all organs", "organs missing, mean"), rows)


def _pan_fm_organs(kept: KeptResult) -> str:
    organs = [metric for metric in kept.metrics if metric.startswith("auc_without_")]
    rows = [(arm, *_means(kept, arm, organs)) for arm in kept.arms]
    return table(("AUC without", *(metric.removeprefix("auc_without_") for metric in organs)), rows)


def _pan_fm_labels(kept: KeptResult) -> str:
    arms = [arm for arm in _PAN_FM_LABELS if arm in kept.arms]
    whole = {"category": "mean of the categories", "disease": "mean of the diseases"}
    single = [metric for metric in kept.metrics if metric.startswith("label_") and "missing" not in metric]
    rows = [(name, *_complete_and_missing(kept, arms, kind, f"{kind}_missing")) for kind, name in whole.items()]
    for metric in single:
        name = metric.removeprefix("label_")
        rows.append((name, *_complete_and_missing(kept, arms, metric, f"label_missing_{name}")))
    return table(("AUC, all organs / organs missing", *arms), rows)


def _complete_and_missing(kept: KeptResult, arms: Sequence[str], complete: str, missing: str) -> list[str]:
    return [" / ".join(_means(kept, arm, (complete, missing))) for arm in arms]


def _means(kept: KeptResult, arm: str, metrics: Iterable[str]) -> list[str]:
    return [short(float(np.mean(kept.of(metric, arm)))) for metric in metrics]


_PARTS: Mapping[str, Mapping[str, Callable[[KeptResult], str]]] = {
    "demo": {"demo": _demo, "demo-differences": _demo_differences},
    "real-pictures": {
        "real-pictures-commit": measured_at,
        "real-pictures-last-block": _last_block,
        "real-pictures-readout": _readout,
        "real-pictures-differences": _picture_differences,
        "real-pictures-rounds-kept": _rounds_kept,
        "real-pictures-targets": _picture_targets,
    },
    "real-pictures-scratch": {
        "real-pictures-scratch": lambda kept: f"{measured_at(kept)}\n{_pictures(kept, kept.arms)}",
        "real-pictures-scratch-differences": _picture_differences,
        "real-pictures-scratch-targets": targets,
    },
    "dex-pictures": {"dex-pictures": _dex_pictures},
    **STUDY_TABLES,
    **PHANTOM_TABLES,
    **COST_TABLES,
    "pan-fm": {
        "pan-fm": _pan_fm,
        "pan-fm-differences": _pan_fm_differences,
        "pan-fm-organs": _pan_fm_organs,
        "pan-fm-labels": _pan_fm_labels,
    },
}
"""Study -> name of a table -> function that writes it."""
