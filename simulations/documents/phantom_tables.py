"""Writes the tables of studies on phantoms: masking, sharing, coding, optimisers, privacy and Director-Experts."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from simulations.documents.kept_results import KeptResult, short, signed, with_spread
from simulations.documents.markdown import table
from simulations.documents.study_tables import differences, means, measured_at, targets

_SHARING = {"mean/auc": "each site's own organs, mean over sites", "all-organs/auc": "all organs"}
_PRIVACY = {"auc": "AUC", "mia_auc": "membership AUC", "psnr": "PSNR of the attack", "psnr_grey": "PSNR of grey"}
_FEDERATED_EXPERTS = {
    "probe_own": "probe, own modalities",
    "probe_own_director": "the same through the director",
    "probe_heldout": "probe, held-out modality",
    "probe_newsite": "probe, a site that joins at the end",
}
_EXPERTS = {
    "nmi": "mutual information of expert and modality (nmi)",
    "conflict": "conflict of gradients between modalities",
    "probe_own": "probe, own modality",
    "probe_pooled": "probe, modalities pooled",
    "probe_heldout": "probe, held-out modality",
    "cka": "CKA between modalities",
    "val_loss": "validation loss",
}
_MASKING = {
    "auc": "AUC",
    "auc_no_dominant": "AUC, dominant organs missing",
    "saliency_entropy": "entropy of saliency",
    "effective_rank": "effective rank",
}


def _sharing(kept: KeptResult) -> str:
    shown = means(kept, "AUC", _SHARING, ("local", "plain", "grouped", "centralised"))
    pairs = [("grouped", "plain"), ("grouped", "local"), ("centralised", "grouped")]
    return f"{measured_at(kept)}\n{shown}\n{differences(kept, 'AUC', _SHARING, pairs)}\n{targets(kept)}"


def _against_first(kept: KeptResult, *, with_bytes: bool) -> str:
    """AUC by seed of every arm, its difference from the first arm, and its share of the first one's bytes."""
    first, seeds = kept.arms[0], kept.seeds()
    rows = []
    for arm in kept.arms:
        gains = kept.gains(["auc"], arm, first)[0]
        ahead = "" if arm == first else f"{signed(float(gains.mean()), 4)} ({int((gains > 0).sum())} of {len(gains)})"
        sent = np.mean(kept.of("bytes_up_round", arm)) / np.mean(kept.of("bytes_up_round", first))
        cells = [short(value, 4) for value in kept.of("auc", arm)]
        rows.append((arm, *cells, ahead, *([short(float(sent))] if with_bytes else [])))
    head = ("AUC", *(f"seed {seed}" for seed in seeds), f"minus {first} (seeds ahead)")
    return f"{measured_at(kept)}\n{table((*head, *(['bytes'] if with_bytes else [])), rows)}"


def _privacy(kept: KeptResult) -> str:
    rows = []
    for arm in kept.arms:
        decibels = (f"{np.mean(kept.of(metric, arm)):.1f}" for metric in ("psnr", "psnr_grey"))
        rows.append((arm, *(with_spread(kept.of(metric, arm)) for metric in ("auc", "mia_auc")), *decibels))
    return f"{measured_at(kept)}\n{table(('arm', *_PRIVACY.values()), rows)}\n{targets(kept)}"


def _experts(kept: KeptResult) -> str:
    shown = means(kept, "measure", _EXPERTS, kept.arms)
    probes = {metric: name for metric, name in _EXPERTS.items() if metric.startswith("probe")}
    pairs = [("dex", "dense"), ("dex-director", "dense"), ("untrained", "dense")]
    return f"{measured_at(kept)}\n{shown}\n{differences(kept, 'probe', probes, pairs)}\n{targets(kept)}"


def _federated_experts(kept: KeptResult) -> str:
    shown = means(kept, "measure", _FEDERATED_EXPERTS, kept.arms)
    sending = [arm for arm in kept.arms if np.isfinite(kept.of("bytes_round", arm)).all()]
    megabytes = table(
        ("", *sending), [("MB a round", *(f"{np.mean(kept.of('bytes_round', arm)) / 1e6:.2f}" for arm in sending))]
    )
    pairs = [("private", baseline) for baseline in ("dense", "naive", "local")]
    gaps = differences(kept, "probe", _FEDERATED_EXPERTS, pairs)
    return f"{measured_at(kept)}\n{shown}\n{megabytes}\n{gaps}\n{targets(kept)}"


def _masking(kept: KeptResult) -> str:
    """A row per phantom and arm; in brackets the difference from random masking, its deviation, and pairs ahead."""
    phantoms = dict.fromkeys(metric.partition("/")[0] for metric in kept.metrics if "/" in metric)
    rows = []
    for phantom in phantoms:
        for arm in kept.arms:
            cells = [_over_random(kept, f"{phantom}/{metric}", arm) for metric in _MASKING]
            if any(cells):
                rows.append((f"`{phantom}`", arm, *cells))
    return f"{measured_at(kept)}\n{table(('phantom', 'arm', *_MASKING.values()), rows)}"


def _over_random(kept: KeptResult, metric: str, arm: str) -> str:
    values = kept.of(metric, arm)
    if not values:
        return ""
    shown, gains = short(float(np.mean(values))), kept.gains([metric], arm, "random")
    if arm == "random" or not gains.size:
        return shown
    spread = f" ± {short(float(np.std(gains[0], ddof=1)))}" if gains.size > 1 else ""
    ahead = f"{int((gains[0] > 0).sum())} of {gains.size}"
    return f"{shown} ({signed(float(gains.mean()))}{spread}, {ahead})"


def _bounds(kept: KeptResult) -> str:
    shown = means(kept, "AUC", {"transient/auc": "all labels", "transient/auc_weak": "weak organs"}, kept.arms)
    return f"{measured_at(kept)}\n{shown}"


def _with_targets(write: Callable[[KeptResult], str]) -> Callable[[KeptResult], str]:
    return lambda kept: f"{write(kept)}\n{targets(kept)}"


_MASKING_FILES: Sequence[str] = ("sgm", "sgm-policies", "sgm-latent", "sgm-latent-medium", "sgm-latent-long")
PHANTOM_TABLES: Mapping[str, Mapping[str, Callable[[KeptResult], str]]] = {
    "sharing": {"sharing": _sharing},
    "coding": {"coding": lambda kept: _against_first(kept, with_bytes=True)},
    "server-optimisers": {"server-optimisers": lambda kept: _against_first(kept, with_bytes=False)},
    "privacy": {"privacy": _privacy},
    "dex": {"dex": _experts},
    "dex-federated": {"dex-federated": _federated_experts},
    "sgm-bounds": {"sgm-bounds": _bounds},
    **{name: {name: _with_targets(_masking)} for name in _MASKING_FILES},
}
"""Name of a result file -> name of a table -> function that writes it."""
