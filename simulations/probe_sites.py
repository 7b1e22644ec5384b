"""Probes of the federated model by the labels that sites hold: each site by itself, and all by summed statistics.

    local-probe       a ridge probe of every site's own labels; mean over the sites that hold both classes
    federated-probe   the probes that the run fitted from the sums of all sites (server/label_probe.py)
    federated-lda     the linear discriminant analyses of the same sums, in a run with `probe.lda-shrinkage`

All are tested on the held-out subjects, beside the arm `federated`, whose probe has all labels in one place. Features
are not whitened.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from panfm.evaluate.embed import embed_store
from panfm.evaluate.federated_probe import LabelledSite, probe_together
from panfm.evaluate.label_sums import Floats
from panfm.evaluate.linear_probe import auc_per_label
from panfm.evaluate.probe_cohort import Task
from panfm.evaluate.probe_file import LinearProbe, SharedProbe
from panfm.evaluate.probe_labels import LabelledStore, label_groups
from panfm.evaluate.result import ProbeResult, Score
from panfm.evaluate.scores import interval
from panfm.models import PanModel

FEDERATED, LOCAL, LDA = "federated-probe", "local-probe", "federated-lda"


def probe_sites(task: Task, model: PanModel, shared: Mapping[str, SharedProbe]) -> ProbeResult:
    """Test the probes of a run's tasks, and each site's own probes of their yes/no labels.

    Args:
        task: Its places are the sites.
        model: The federated model, not whitened.
        shared: Task of labels -> its probe.
    Returns:
        Scores of the arms by group of labels, and notes; empty without probes.
    """
    by_label = {
        label: _of_label(probe.probe, index)
        for probe in shared.values()
        for index, label in enumerate(probe.labels)
        if label in task.names(is_number=False)
    }
    if not by_label:
        return _result()
    names = list(by_label)
    sites = [_labelled(place, model, names) for place in task.places]
    test = _embed(model, task.holdout, task.test_indices)
    aucs = {
        FEDERATED: _auc(task, by_label, names, test),
        LOCAL: _mean([_auc(task, _own_probes(site), names, test) for site in sites]),
    }
    discriminants = {
        label: _of_label(probe.lda, index)
        for probe in shared.values()
        if probe.lda is not None
        for index, label in enumerate(probe.labels)
        if label in by_label
    }
    if discriminants:
        aucs[LDA] = _auc(task, discriminants, names, test)
    groups = {group: [name for name in members if name in names] for group, members in label_groups(task.info).items()}
    scores = [
        _score(arm, group, values[:, [names.index(name) for name in members]])
        for arm, values in aucs.items()
        for group, members in groups.items()
        if members
    ]
    return _result(scores)


def _of_label(probe: LinearProbe, index: int) -> LinearProbe:
    """The part of a probe that tells one of its labels."""
    return LinearProbe(probe.centre, probe.scale, probe.weights[:, [index]], probe.bias[[index]])


def _labelled(place: LabelledStore, model: PanModel, names: Sequence[str]) -> LabelledSite:
    """Features and labels of a site's training subjects."""
    at = place.store.indices("train")
    targets = {name: place.values([name], at) for name in names}
    known = {name: values for name, values in targets.items() if np.isfinite(values).any()}
    return LabelledSite("", _embed(model, place, at), known, 1)


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


def _result(scores: Sequence[Score] = ()) -> ProbeResult:
    return ProbeResult(tuple(scores), {}, {}, {})
