"""The last step of a run with `probe.tasks`: one ridge probe of each task on the labelled patients of all sites.

    1. ask the sites that are there for sums of features and labels, keep them    exchange.py
    2. solve the ridge regression of each task under every penalty                panfm/evaluate/federated_probe.py
       and a linear discriminant analysis, in a run with `probe.lda-shrinkage`
    3. send the sites these, ask for summed leave-one-out errors, and choose the penalty with the least
    4. write the probes into the model's folder (`probe.safetensors`), and tell of them in its metadata

A site that gives nothing, or answers badly, is left out and named. The model is saved with or without probes.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any

import numpy as np
from flwr.serverapp import Grid

from panfm.config import RunConfig
from panfm.errors import ProtocolError, one_line
from panfm.evaluate.federated_probe import choose_penalty, discriminants, ridge_path
from panfm.evaluate.label_sums import PENALTIES, Floats, LabelSums, RidgePath, checked_arrays
from panfm.evaluate.probe_file import SharedProbe
from panfm.sharing.groups import Flat
from panfm.sharing.messages import Handshake
from panfm.sharing.sums_messages import Purpose, SumsReply
from server.checkpoint import ServerState
from server.exchange import Answers, Watch, ask_sums, keep_sums, label_sums, read_sums, unwatched
from server.quorum import require_answers

logger = logging.getLogger(__name__)
_NO_VARIANCE = 1e-12
"""Share of a label's mean square below which its variance is rounding."""


@dataclass(frozen=True)
class LabelProbes:
    """Probes of all tasks, and why sites or tasks have none."""

    probes: Mapping[str, SharedProbe] = field(default_factory=dict)
    failed: Mapping[str, str] = field(default_factory=dict)
    """Site, or task of labels -> why it is left out."""

    def summary(self) -> dict[str, Any]:
        """What the model's metadata tell."""
        return {
            "tasks": {task: probe.summary() for task, probe in self.probes.items()},
            "left-out": dict(self.failed),
        }


def fit_probes(
    grid: Grid,
    run: RunConfig,
    state: ServerState,
    roster: Mapping[int, Handshake],
    *,
    frozen: Mapping[str, Flat],
    embedding_size: int,
    kept: Path,
    at_least: int = 0,
    watch: Watch = unwatched,
) -> LabelProbes:
    """Fit the probes of a run's tasks on its final model.

    Args:
        run: As sites are told of it.
        roster: Node id -> handshake of the sites to ask.
        frozen: Group -> its parameters that the run does not train.
        kept: File for the sums of the first message. A server that was killed after it goes on with them, since a site
            answers the second message under one ridge path only.
        at_least: So many sites must answer each message, unless the others have refused for good.
    Raises:
        NoQuorumError: too few answer.
    """
    subjects = {handshake.site: handshake.subjects for handshake in roster.values()}
    if (sums := read_sums(kept)) is None:
        answers = ask_sums(grid, run, state, roster, Purpose.PROBE, frozen=frozen, watch=watch)
        require_answers(answers, at_least, "probe")
        sums = label_sums(run, embedding_size, subjects, answers)
        keep_sums(kept, sums)
    failed = dict(sums.failed)
    of_task = {task: given for task in run.probe.tasks if (given := sums.of_task(task))}
    paths: dict[str, RidgePath] = {}
    for task, given in of_task.items():
        try:
            paths[task] = ridge_path(list(given.values()))
        except ProtocolError as error:
            failed[task] = one_line(str(error))
    if not paths:
        return LabelProbes({}, failed)
    asked = {node_id: handshake for node_id, handshake in roster.items() if handshake.site in sums.by_site}
    told = {task: path.to_arrays() for task, path in paths.items()}
    answers = ask_sums(grid, run, state, asked, Purpose.ERRORS, frozen=frozen, paths=told, watch=watch)
    require_answers(answers, min(at_least, len(sums.by_site)), "probe")
    errors, refused = _errors(run, answers)
    probes = {}
    for task, path in paths.items():
        gave = {site: given[task] for site, given in errors.items() if task in given and site in of_task[task]}
        if missing := sorted(set(of_task[task]) - set(gave)):
            failed[f"errors of {task}"] = f"none of {', '.join(missing)}: the penalty is chosen without"
        if not gave:
            failed[task] = "no site gave leave-one-out errors"
            continue
        probe = _probe(run.probe.tasks[task], path, of_task[task], gave)
        if (shrinkage := run.probe.lda_shrinkage) is not None:
            total = reduce(add, of_task[task].values())
            probe = replace(probe, lda=discriminants(path, total, shrinkage))
        probes[task] = probe
    for name, reason in sorted({**failed, **answers.failed, **refused}.items()):
        logger.warning("probe: %s left out: %s", name, reason)
    return LabelProbes(probes, {**failed, **answers.failed, **refused})


def _errors(run: RunConfig, answers: Answers) -> tuple[dict[str, dict[str, Floats]], dict[str, str]]:
    """Site -> task -> its summed leave-one-out errors [P, C], and why answers were refused."""

    def read(reply: SumsReply) -> dict[str, Floats]:
        if unknown := sorted(set(reply.errors) - set(run.probe.tasks)):
            raise ProtocolError(f"leave-one-out errors of {unknown[0]!r:.80}, which the run does not name")
        given = {}
        for task, array in reply.errors.items():
            shape = (len(PENALTIES), len(run.probe.tasks[task]))
            given[task] = checked_arrays({task: array}, {task: shape})[task]
            if (given[task] < 0).any():
                raise ProtocolError("leave-one-out errors: found a negative sum of squares")
        return given

    return answers.read(read)


def _probe(
    labels: tuple[str, ...], path: RidgePath, sums: Mapping[str, LabelSums], errors: Mapping[str, Floats]
) -> SharedProbe:
    """The probe of a task, its R2 over the patients of the sites that gave errors."""
    probe, penalty = choose_penalty(path, [{"errors": given} for given in errors.values()])
    squares = np.sum([sums[site].yy for site in errors], axis=0)
    count, total = (np.sum([getattr(sums[site], part) for site in errors], axis=0) for part in ("count", "y"))
    spread = squares - total**2 / count
    left = np.sum(list(errors.values()), axis=0)[list(PENALTIES).index(penalty)]
    r2 = 1.0 - np.divide(left, spread, out=np.full(len(labels), np.nan), where=spread > _NO_VARIANCE * squares)
    return SharedProbe(labels, int(path.count), tuple(sums), penalty, tuple(r2.tolist()), probe)
