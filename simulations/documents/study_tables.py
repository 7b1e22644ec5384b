"""Writes the tables of studies whose result file is that of one call: means by metric and arm, and targets."""

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from simulations.documents.kept_results import KeptResult, by_seed, short, signed, with_spread
from simulations.documents.markdown import cell, table

_FEW_LABELS = ("local", "score-mean", "federated", "federated-floors", "pooled")
_VOLUMES = {
    "statistics": "statistics, at 1 mm | blocks of 8 mm",
    "untrained": "untrained | layers",
    "untrained-in-place": " | in place",
    "views": "views | layers",
    "views-in-place": " | **in place** (chosen)",
    "untrained-coarse": "untrained, tokens of 10 x 14 x 10 mm | layers",
    "untrained-coarse-in-place": " | in place",
    "views-coarse": "views, tokens of 10 x 14 x 10 mm | layers",
    "views-coarse-in-place": " | in place",
    "start-slices": "public ViT-S/14, frozen, 12 coronal slices | blocks 8, 10, 12, mean over slices",
    "start-slices-in-place": " | in place, block 8",
}
"""Arm of `real-volumes` -> its name and its reading, as two cells."""
_INFLATION = {
    "start-mean": "mean: kernel spread over the depth | layers",
    "start-mean-in-place": " | in place",
    "start-centre": "centre: kernel in the middle slice | layers",
    "start-centre-in-place": " | in place",
    "start-joint": "slices in one sequence | layers",
    "start-joint-in-place": " | in place",
}
"""Arm -> row of the table: the ways in which a public 2D model reads volumes."""


def measured_at(kept: KeptResult) -> str:
    """Name the commit and the seeds of a result."""
    draws, seeds = (sorted({*parts}) for parts in zip(*(divmod(seed, 100) for seed in kept.seeds()), strict=True))
    on = f" on each of draws {', '.join(map(str, draws))}" if len(draws) > 1 else ""
    return f"Commit {kept.commit}, seeds {', '.join(map(str, seeds if on else kept.seeds()))}{on}.\n"


def targets(kept: KeptResult) -> str:
    """Write what the study was asked to show, and whether it did."""
    rows = []
    for target in kept.targets:
        verdict = "met" if target.is_met else "**missed**"
        rows.append((cell(target.claim), _number(target.least), f"{_number(target.value)}: {verdict}"))
    return table(("target", "at least", "measured"), rows)


def means(kept: KeptResult, head: str, metrics: Mapping[str, str], arms: Sequence[str]) -> str:
    """Write mean ± standard deviation over the seeds: a row per metric (metric -> its name), a column per arm."""
    rows = [(name, *(with_spread(kept.of(metric, arm)) for arm in arms)) for metric, name in metrics.items()]
    return table((head, *arms), rows)


def differences(kept: KeptResult, head: str, metrics: Mapping[str, str], pairs: Sequence[tuple[str, str]]) -> str:
    """Write arm minus baseline, seed by seed: a row per metric (metric -> its name) and pair that was measured."""
    rows = []
    for metric, name in metrics.items():
        for arm, baseline in pairs:
            gains = kept.gains([metric], arm, baseline)
            if gains.size:
                rows.append((name, f"{arm} minus {baseline}", signed(float(gains.mean())), by_seed(gains[0])))
    return table((head, "difference", "mean", "by seed"), rows)


def _few_labels(kept: KeptResult) -> str:
    metrics = {
        metric: f"{metric.split('_')[1]}, {metric.split('_')[2]}"
        for metric in kept.metrics
        if metric.startswith("auc_")
    }
    return f"{measured_at(kept)}\n{means(kept, 'task, labels per site', metrics, _FEW_LABELS)}"


def _few_labels_differences(kept: KeptResult) -> str:
    pairs = [("federated", "local"), ("federated", "score-mean")]
    return differences(
        kept, "mean over tasks", {f"auc_mean_{labels}": f"{labels} labels" for labels in (10, 20, 40)}, pairs
    )


def _volumes(kept: KeptResult, named: Mapping[str, str] = _VOLUMES) -> str:
    rows = []
    for arm, names in named.items():
        interval = " to ".join(short(float(np.mean(kept.of(f"r2_mean_{end}", arm))), 2) for end in ("low", "high"))
        values = (with_spread(kept.of(f"r2_{part}", arm)) for part in ("anterior", "posterior", "mean"))
        rows.append((*names.split(" | "), *values, interval))
    head = ("arm", "reading", "anterior", "posterior", "mean", "interval")
    return f"{measured_at(kept)}\n{table(head, rows)}"


def _volume_differences(kept: KeptResult) -> str:
    pairs = [("views", "untrained"), ("views-in-place", "untrained-in-place")]
    pairs += [("views-in-place", "statistics"), ("untrained-in-place", "statistics")]
    return differences(kept, "measure", {"r2_mean": "mean R2"}, pairs)


def _poisoning(kept: KeptResult) -> str:
    seeds = kept.seeds()
    rows = []
    for arm in _attacked(kept):
        shares = _damage(kept, arm)
        cells = (_percent(share) for share in (*shares, float(np.mean(shares))))
        rows.append((arm.split("/")[0], *cells, short(max(kept.of("site_share", arm)), 2)))
    head = ("attack", *(f"seed {seed}" for seed in seeds), "mean", "largest share of a group")
    return f"{measured_at(kept)}\n{table(head, rows)}"


def _poisoning_means(kept: KeptResult) -> str:
    rows = []
    for arm in kept.arms:
        loss, auc, share = (kept.of(metric, arm)[0] for metric in ("val_loss", "auc", "site_share"))
        lost = _damage(kept, arm)[0] if "/" in arm else None
        is_lost = lost is not None and not lost <= 1.0
        shown = ("diverged", "> 100 %") if is_lost else (short(loss), "" if lost is None else _percent(lost))
        rows.append((arm, shown[0], short(auc), short(share), shown[1]))
    head = ("arm", "loss on held-out patients", "AUC", "largest share of a group", "damage")
    return f"{measured_at(kept)}\n{table(head, rows)}"


def _downstream(kept: KeptResult) -> str:
    arms = [arm for arm in kept.arms if not arm.endswith("-probe")]
    return f"{measured_at(kept)}\n{means(kept, 'measure, task, labels', _spaced(kept.metrics), arms)}"


def _downstream_probes(kept: KeptResult) -> str:
    arms = [arm for arm in kept.arms if arm.endswith("-probe")]
    metrics = [metric for metric in kept.metrics if any(kept.of(metric, arm) for arm in arms)]
    return means(kept, "measure, task, labels", _spaced(metrics), arms)


def _downstream_differences(kept: KeptResult) -> str:
    from simulations.studies.downstream_study import PAIRS

    return differences(kept, "measure, task, labels", _spaced(kept.metrics), PAIRS)


def _fine_tuning(kept: KeptResult) -> str:
    pairs = [("federated", "best-site"), ("federated", "pooled")]
    shown = means(kept, "measure, task", _spaced(kept.metrics), kept.arms)
    return f"{measured_at(kept)}\n{shown}\n{differences(kept, 'measure, task', _spaced(kept.metrics), pairs)}"


def _spaced(metrics: Sequence[str]) -> dict[str, str]:
    return {metric: metric.replace("_", " ") for metric in metrics}


def _damage(kept: KeptResult, arm: str) -> list[float]:
    """Share of the honest federation's gain in validation loss that an attack costs, by seed."""
    from simulations.studies.poisoning_study import references

    start, honest = (np.array(kept.of("val_loss", reference)) for reference in references(arm))
    return [*((np.array(kept.of("val_loss", arm)) - honest) / (start - honest))]


def _attacked(kept: KeptResult) -> Iterator[str]:
    return (arm for arm in kept.arms if "/" in arm)


def _number(value: float) -> str:
    return signed(value) if value == 0 or abs(value) >= 0.0005 else f"{value:+.0e}"


def _percent(share: float) -> str:
    return f"{short(100 * share, 1)} %"


STUDY_TABLES: Mapping[str, Mapping[str, Callable[[KeptResult], str]]] = {
    "few-labels": {
        "few-labels": _few_labels,
        "few-labels-differences": _few_labels_differences,
        "few-labels-targets": targets,
    },
    "real-volumes": {
        "real-volumes": _volumes,
        "real-volumes-differences": _volume_differences,
        "real-volumes-targets": targets,
    },
    "real-volumes-inflation": {"real-volumes-inflation": lambda kept: _volumes(kept, _INFLATION)},
    "poisoning": {"poisoning": _poisoning},
    "poisoning-means": {"poisoning-means": _poisoning_means},
    "downstream": {
        "downstream": _downstream,
        "downstream-probes": _downstream_probes,
        "downstream-differences": _downstream_differences,
        "downstream-targets": targets,
    },
    "federated-fine-tuning": {"federated-fine-tuning": _fine_tuning, "federated-fine-tuning-targets": targets},
}
"""Study -> name of a table -> function that writes it."""
