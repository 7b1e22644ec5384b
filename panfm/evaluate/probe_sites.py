"""Probes of the federated model by the labels that sites hold: each site by itself, and all by summed statistics.

    local-probe       a ridge probe of every site's own labels; mean over the sites that hold both classes
    federated-probe   one ridge probe from the sums of all sites (federated_probe.py), with their floors

Both are tested on the held-out subjects, beside the arm `federated`, whose probe has all labels in one place. Sums of
labels are covered by no privacy claim: a private run gets neither.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from panfm.config import SiteConfig
from panfm.evaluate.embed import embed_store
from panfm.evaluate.federated_probe import LabelledSite, probe_together
from panfm.evaluate.label_sums import Floats
from panfm.evaluate.linear_probe import LinearProbe, auc_per_label
from panfm.evaluate.probe_cohort import Task
from panfm.evaluate.probe_labels import LabelledStore, label_groups
from panfm.evaluate.result import ProbeResult, Score
from panfm.evaluate.scores import interval
from panfm.models import PanModel
from panfm.privacy.guarantees import privacy_label

FEDERATED, LOCAL = "federated-probe", "local-probe"
MAX_FEATURES = 512
"""Embeddings with more numbers take too long, label by label, at the end of every run."""


def probe_sites(task: Task, model: PanModel, configs: Sequence[SiteConfig]) -> ProbeResult:
    """Probe the yes/no labels that at least two sites hold.

    Args:
        task: Its places are the sites.
        model: The federated model.
        configs: Descriptions of the sites, for names and floors.
    Returns:
        Scores of the two arms by group of labels, and notes; empty where there is nothing to share.
    """
    names = [name for name in task.names(is_number=False) if sum(_knows(place, name) for place in task.places) > 1]
    if not names:
        return _result()
    if (label := privacy_label(task.run)) != "none":
        return _result(notes=[f"{FEDERATED}: left out, sums of labels are not covered by the run's claim ({label})"])
    if model.embedding_size > MAX_FEATURES:
        return _result(notes=[f"{FEDERATED}: left out, embeddings have more than {MAX_FEATURES} numbers"])
    sites = [_labelled(task, index, model, names, config) for index, config in enumerate(configs)]
    test = _embed(model, task.holdout, task.test_indices)
    together = probe_together(sites)
    aucs = {
        FEDERATED: _auc(task, together.probes, names, test),
        LOCAL: _mean([_auc(task, _own_probes(site), names, test) for site in sites]),
    }
    groups = {group: [name for name in members if name in names] for group, members in label_groups(task.info).items()}
    scores = [
        _score(arm, group, values[:, [names.index(name) for name in members]])
        for arm, values in aucs.items()
        for group, members in groups.items()
        if members
    ]
    notes = [
        f"{FEDERATED}: {name}: {len(lines)} of {len(names)} labels given in part or not at all, too few patients"
        for name, lines in together.withheld.items()
    ]
    return _result(scores, notes)


def _knows(place: LabelledStore, name: str) -> bool:
    """Whether any training subject of a place has a label."""
    return bool(np.isfinite(place.values([name], place.store.indices("train"))).any())


def _labelled(task: Task, index: int, model: PanModel, names: Sequence[str], config: SiteConfig) -> LabelledSite:
    """Features and labels of a site's training subjects."""
    place, at = task.places[index], task.places[index].store.indices("train")
    targets = {name: place.values([name], at) for name in names if _knows(place, name)}
    return LabelledSite(config.name, _embed(model, place, at), targets, config.limits.smallest_batch)


def _embed(model: PanModel, place: LabelledStore, at: NDArray[np.int64]) -> NDArray[np.float32]:
    return embed_store(model, place.store, at, [name for name in model.stream_names if name in place.store.images])


def _own_probes(site: LabelledSite) -> Mapping[str, LinearProbe]:
    """A site's own probes of the labels of which it has both classes; it needs no floor against itself."""
    both = {name: values for name, values in site.targets.items() if {0.0, 1.0} <= {*values.flatten().tolist()}}
    return probe_together([LabelledSite(site.name, site.features, both, 1)]).probes


def _auc(task: Task, probes: Mapping[str, LinearProbe], names: Sequence[str], test: NDArray[np.float32]) -> Floats:
    """AUC [resamples, labels] on the held-out subjects; NaN of a label without a probe."""
    unknown = np.full(len(test), np.nan)
    scores = [probes[name].score(test)[:, 0] if name in probes else unknown for name in names]
    return auc_per_label(np.stack(scores, axis=1), task.targets(names)[1], task.counts)


def _mean(values: Sequence[Floats]) -> Floats:
    """Mean over sites, without those that have no probe; NaN where none has."""
    stacked = np.stack(values)
    known = np.isfinite(stacked)
    total, count = np.where(known, stacked, 0.0).sum(axis=0), known.sum(axis=0)
    mean: Floats = np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)
    return mean


def _score(arm: str, group: str, values: Floats) -> Score:
    return Score.of(arm, group, "auc", interval(values), int(np.isfinite(values[0]).sum()))


def _result(scores: Sequence[Score] = (), notes: Sequence[str] = ()) -> ProbeResult:
    return ProbeResult(tuple(scores), {}, {}, {}, tuple(notes))
