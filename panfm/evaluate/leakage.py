"""Leakage of an embedding: how much of it says only which organs are present, or only which site a patient is from.

    presence    held-out patients are embedded from every one of M sets of organs, z_mi of patient i from set m
                variance = (SS_sets - SS_rest / (N - 1)) / SS_all
                  SS_sets = N sum_m |z_m. - z..|^2     SS_patients = M sum_i |z_.i - z..|^2
                  SS_all = sum_mi |z_mi - z..|^2       SS_rest = SS_all - SS_sets - SS_patients
                auc = mean over organs of the AUC of a linear probe for "this organ is present", fitted on half of the
                  patients, tested on the others
    site        the sites' patients as they were scanned
                variance = (SS_sites - (K - 1) SS_within / (N - K)) / SS_all, of K sites
                accuracy = mean over sites of the share of its patients whom linear probes, one per site, give to it;
                  fitted on training patients, tested on the others
                accuracy-of-presence = the same, of probes that know only which organs each patient has

A dot is a mean over that index. By chance a variance is 0, an AUC is .5 and an accuracy is 1 / K. Sets come in pairs, a
set and the organs that it lacks, so each organ is present in half of them, whatever the others are: what the sets
explain is no content. A variance below 0 is told as 0. Intervals are 95 % bootstrap over patients; in a resample, what
patients add to sums between sets or sites by chance follows from how often each is drawn.

A site that scans other organs than the rest is known from them alone: read `accuracy` beside `accuracy-of-presence`.

Shape legend: M sets, N patients, D features, S streams or organs, K sites, R resamples.
"""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from panfm.anatomy import parse_stream
from panfm.data.store import ImageStore
from panfm.evaluate.embed import Embedder, embed_store
from panfm.evaluate.linear_probe import MIN_SUBJECTS, auc_per_label, fit_classifiers
from panfm.evaluate.probe_cohort import Task
from panfm.evaluate.probe_labels import LabelledStore
from panfm.evaluate.result import Leakage
from panfm.evaluate.scores import Floats, draw_counts, interval
from panfm.models import PanModel
from panfm.seeds import numpy_generator

Features = NDArray[np.floating]

_SETS = 16
_MOST_PATIENTS = 64


def leakage(task: Task, models: Mapping[str, PanModel]) -> tuple[Leakage, ...]:
    """Measure what the models' embeddings say of organs present and of sites.

    What cannot be told is left out: presence where too few held-out patients have several organs in common, sites where
    fewer than two have patients outside training.
    """
    return tuple(
        score
        for arm, model in models.items()
        for score in [*_of_presence(task, arm, model), *_of_sites(task, arm, model)]
    )


def organ_sets(num_organs: int, seed: int) -> NDArray[np.bool_]:
    """Which organs are present in each set, bool [M, S]: random sets, each followed by its complement; none is empty.

    Guarantees:
        few organs: every set occurs once if there are at most 16; without two organs there is no set.
    """
    every = np.array([[index >> organ & 1 for organ in range(num_organs)] for index in range(1, 2**num_organs // 2)])
    if num_organs < 2:
        return np.zeros((0, num_organs), dtype=bool)
    generator = numpy_generator(seed, "organ-sets")
    chosen = generator.choice(len(every), min(len(every), _SETS // 2), replace=False)
    half = every[np.sort(chosen)].astype(bool)
    return np.stack([half, ~half], axis=1).reshape(-1, num_organs)


def organs_present(streams: Sequence[str], seed: int) -> tuple[NDArray[np.bool_], list[list[str]]]:
    """The sets of organs [M, S] of some streams, and the streams of each; none of one organ."""
    organs = list(dict.fromkeys(parse_stream(stream)[0] for stream in streams))
    sets = organ_sets(len(organs), seed)
    named = [{organ for organ, is_in in zip(organs, row, strict=True) if is_in} for row in sets]
    return sets, [[stream for stream in streams if parse_stream(stream)[0] in names] for names in named]


def complete_patients(store: ImageStore, streams: Sequence[str], at: Iterable[int]) -> NDArray[np.int64]:
    """The first 64 of some patients who have all of the streams."""
    complete = [index for index in at if all(index in store.rows[stream] for stream in streams)]
    return np.array(complete[:_MOST_PATIENTS], dtype=np.int64)


def presence_variance(features: Features, counts: Floats) -> Floats:
    """Share of the variance of features [M, N, D] that only the set of organs explains, per resample [R].

    Args:
        counts: [R, N], see `draw_counts`.
    Guarantees:
        nothing varies, or fewer than two patients or sets: NaN.
    """
    sets, patients, _ = features.shape
    if sets < 2 or patients < 2:
        return np.full(len(counts), np.nan)
    centred = np.asarray(features, dtype=np.float64) - np.mean(features, axis=(0, 1), dtype=np.float64)
    number = counts.sum(axis=1)
    means = np.einsum("rn,mnd->rmd", counts / number[:, None], centred, optimize=True)
    middle = sets * number * (means.mean(axis=1) ** 2).sum(axis=1)
    whole = counts @ (centred**2).sum(axis=(0, 2)) - middle
    of_sets = number * (means**2).sum(axis=(1, 2)) - middle
    of_patients = sets * (counts @ (centred.mean(axis=0) ** 2).sum(axis=1)) - middle
    rest, repeats = np.maximum(whole - of_sets - of_patients, 0.0), (counts**2).sum(axis=1) / number
    by_chance = np.divide(rest * repeats, number - repeats, out=np.full(len(counts), np.nan), where=number > repeats)
    return _share(of_sets - by_chance, whole, features)


def site_variance(features: Features, sites: NDArray[np.int64], counts: Floats) -> Floats:
    """Share of the variance of features [N, D] that only the site [N] explains, per resample [R].

    Guarantees:
        one site, as many sites as patients, or nothing that varies: NaN.
    """
    centred = np.asarray(features, dtype=np.float64) - np.mean(features, axis=0, dtype=np.float64)
    belongs = np.eye(int(sites.max(initial=0)) + 1)[sites]
    number, per_site = counts.sum(axis=1), counts @ belongs
    sums = np.einsum("rn,nk,nd->rkd", counts, belongs, centred, optimize=True)
    middle = (sums.sum(axis=1) ** 2).sum(axis=1) / number
    whole = counts @ (centred**2).sum(axis=1) - middle
    between = ((sums**2).sum(axis=2) / np.maximum(per_site, 1.0)).sum(axis=1) - middle
    repeats = (counts**2 @ belongs / np.maximum(per_site, 1.0)).sum(axis=1)
    is_told = (number > repeats) & ((per_site > 0).sum(axis=1) > 1)
    within = np.divide(whole - between, number - repeats, out=np.full(len(counts), np.nan), where=is_told)
    by_chance = (repeats - (counts**2).sum(axis=1) / number) * np.maximum(within, 0.0)
    return _share(between - by_chance, whole, features)


def _share(part: Floats, whole: Floats, features: Features) -> Floats:
    """Part of a sum of squares, in [0, 1]; NaN where the whole is rounding error."""
    least = 1e-12 * max(1.0, float(np.abs(features).max(initial=0.0)) ** 2) * features.size
    share: Floats = np.divide(part, whole, out=np.full(len(whole), np.nan), where=whole > least)
    return np.clip(share, 0.0, 1.0)


def presence_auc(features: Features, present: NDArray[np.bool_], counts: Floats, seed: int) -> Floats:
    """AUC of linear probes for every organ, fitted on half of the patients and tested on the others [R, S].

    Args:
        features: [M, N, D].
        present: [M, S].
        counts: [R, N]; those of the tested patients count.
    """
    sets, patients, width = features.shape
    shuffled = numpy_generator(seed, "presence-halves").permutation(patients)
    fit, test = shuffled[: patients // 2], shuffled[patients // 2 :]
    truth, names = present.astype(np.float64), [str(organ) for organ in range(present.shape[1])]
    probe = fit_classifiers(features[:, fit].reshape(-1, width), np.repeat(truth, len(fit), axis=0), names)
    scores = probe.score(features[:, test].reshape(-1, width))
    return auc_per_label(scores, np.repeat(truth, len(test), axis=0), np.tile(counts[:, test], sets))


def site_accuracy(
    fit: Features, fit_sites: NDArray[np.int64], test: Features, sites: NDArray[np.int64], counts: Floats
) -> Floats:
    """Mean over sites of the share of its test patients whom linear probes give to it, per resample [R].

    Args:
        fit: [N, D], with their sites [N].
        test: [n, D], with their sites [n].
        counts: [R, n].
    """
    number = int(max(fit_sites.max(), sites.max())) + 1
    probe = fit_classifiers(fit, np.eye(number)[fit_sites], [str(site) for site in range(number)])
    right = np.nan_to_num(probe.score(test), nan=-np.inf).argmax(axis=1) == sites
    belongs = np.eye(number)[sites]
    patients, hits = counts @ belongs, counts @ (belongs * right[:, None])
    shares = np.divide(hits, patients, out=np.full(hits.shape, np.nan), where=patients > 0)
    return np.nanmean(shares, axis=1)


def _of_presence(task: Task, arm: str, model: Embedder) -> list[Leakage]:
    store, streams = task.holdout.store, task.streams
    drawn = complete_patients(store, streams, task.test_indices)
    sets, parts = organs_present(streams, task.run.seed)
    if len(drawn) < 2 * MIN_SUBJECTS or not parts:
        return []
    counts = draw_counts(len(drawn), task.run.probe.bootstrap, task.run.seed)
    features = np.stack([embed_store(model, store, drawn, names) for names in parts])
    auc = presence_auc(features, sets, counts, task.run.seed)
    return [
        Leakage.of(arm, "presence", "variance", interval(presence_variance(features, counts)[:, None]), 0.0),
        Leakage.of(arm, "presence", "auc", interval(auc), 0.5),
    ]


def _of_sites(task: Task, arm: str, model: PanModel) -> list[Leakage]:
    places = [
        place for place in task.places if len(place.store.indices("train")) >= MIN_SUBJECTS and len(_others(place))
    ]
    if len(places) < 2:
        return []
    train, others = [place.store.indices("train") for place in places], [_others(place) for place in places]
    fit_sites, sites = (np.repeat(np.arange(len(places)), list(map(len, at))) for at in (train, others))
    counts = draw_counts(len(sites), task.run.probe.bootstrap, task.run.seed)
    fit, test = (_embedded(model, places, at) for at in (train, others))
    flags_fit, flags = (_stream_flags(tuple(task.run.streams), places, at) for at in (train, others))
    values = {
        "variance": site_variance(test, sites, counts),
        "accuracy": site_accuracy(fit, fit_sites, test, sites, counts),
        "accuracy-of-presence": site_accuracy(flags_fit, fit_sites, flags, sites, counts),
    }
    return [
        Leakage.of(arm, "site", metric, interval(of[:, None]), 0.0 if metric == "variance" else 1 / len(places))
        for metric, of in values.items()
    ]


def _others(place: LabelledStore) -> NDArray[np.int64]:
    """A site's patients outside training."""
    return np.sort(np.concatenate([place.store.indices("val"), place.store.indices("test")]))


def _embedded(model: PanModel, places: Sequence[LabelledStore], at: Sequence[NDArray[np.int64]]) -> Features:
    """Embeddings of patients of several places, from all that they have."""
    known = [[name for name in model.stream_names if name in place.store.images] for place in places]
    return np.concatenate(
        [embed_store(model, place.store, rows, names) for place, rows, names in zip(places, at, known, strict=True)]
    )


def _stream_flags(streams: Sequence[str], places: Sequence[LabelledStore], at: Sequence[NDArray[np.int64]]) -> Features:
    """1 for each stream that a patient has, else 0."""
    rows = [
        [np.isin(own, place.store.rows.get(stream, [])) for stream in streams]
        for place, own in zip(places, at, strict=True)
    ]
    return np.concatenate([np.stack(columns, axis=1) for columns in rows]).astype(np.float64)
