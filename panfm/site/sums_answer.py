"""A site's answer to a question for sums over its patients: for the probe of all sites, the measure of a gate, or the
constants of the tokenizers' inputs.

    inputs        before round 1: sums of what the tokenizers read of the training images
    gate, probe   sums of features and labels over the training patients, task by task
    errors        their summed leave-one-out errors under the ridge path that the server found from all sites' sums
    gate          with `gate.measure = "validation-loss"` instead: the summed loss of the val split
    evaluation    AUC or R2 of the model on a column of labels (evaluation_answer.py)

Features are those of the model as whoever gets it would read them: shared parameters as the server sent them, private
experts as copies of the director, pooled as `[features]` says, not whitened. Floors are those of label_sums.py.

One answer to each question: purpose and round are noted with a digest of everything that decides the answer, and
another question under them is refused (`asked.json` beside the private states).
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from panfm.config import Releasable, RunConfig, SiteConfig, dump_toml
from panfm.config.site_description import LimitsConfig
from panfm.data.labels import numbers_of, read_site_cells
from panfm.data.store import ImageStore
from panfm.data.subjects import subject_key
from panfm.errors import LimitError, ProtocolError
from panfm.evaluate.input_sums import InputSums
from panfm.evaluate.label_sums import RidgePath, contributing_rows, site_errors, site_sums
from panfm.files import locked, read_checked, write_checked
from panfm.models import describe_model
from panfm.privacy.guarantees import privacy_label
from panfm.sharing.groups import parameter_hashes
from panfm.sharing.sums_messages import Purpose, SumsTask, path_arrays
from panfm.site.asked_model import embed_patients, with_teacher
from panfm.site.session import Session
from panfm.site.state import AskedRounds, StateStore, question_digest, read_asked, write_asked

_LOCK_WAIT_S = 10.0
SUMMED = "label-sums.digest"
"""Beside the runs: what this site sums. An operator who accepts that sums of two sets can be subtracted removes it."""
SUMMED_INPUTS = "input-sums.digest"
"""Beside the runs: digests of the patients and images whose inputs this site sums, by stream."""


def sum_patients(
    session: Session, task: SumsTask, states: StateStore, *, folder: Path, site: SiteConfig
) -> dict[str, Any]:
    """Answer a question for sums; returns the fields of the answer (`panfm.sharing.release.build_sums_reply`).

    Raises:
        ProtocolError: the run does not ask for such sums, is private, or asked for others before; the parameters do not
            fit or are not where the run starts.
        LimitError: this site does not let such sums leave, or too few patients stand behind them.
        DataError: the label table or the private state is faulty.
    """
    torch.set_num_threads(session.run.train.threads)
    if task.purpose is Purpose.INPUTS:
        return {"inputs": _sum_inputs(session, task, states, site.limits)}
    if task.purpose is Purpose.EVALUATION:
        from panfm.site.evaluation_answer import evaluate_column  # most sites are never asked

        score = evaluate_column(session, task, states, folder=folder, site=site)
        numbers = np.array([score.value, score.low, score.high, float(score.is_held_out)])
        return {"score": {score.metric: numbers}, "scored": score.patients}
    with_labels = _check_asked(session, task, site.limits)
    states.check_origin()
    session.load_frozen(task.model, states)
    task = with_teacher(session, task)
    if not with_labels:
        return _validation_loss(session, task, states)
    at = session.store.indices("train")
    targets = read_targets(folder, site, session.store, session.run.probe.tasks, at)
    paths = read_paths(task, describe_model(session.run).embedding_size, session.run.probe.tasks)
    session.trainer.holds = None
    session.load_global(task.model, 0)
    _pin(states.folder.parents[1], session, targets)
    _note(states, session, task, "")
    floor, rows = session.floors.batch, contributing_rows(targets, session.floors.batch)[0]
    if not rows:
        raise LimitError.of_question("probe.tasks: too few patients of this site know the labels of any")
    features = embed_patients(session, at)
    if task.purpose is Purpose.ERRORS:
        return {"errors": site_errors(features, targets, paths, floor=floor)}
    sums = site_sums(features, targets, floor=floor).tasks
    return {"sums": {name: of_task.to_arrays() for name, of_task in sums.items()}}


def describe_answer(run: RunConfig, task: SumsTask, result: Mapping[str, Any]) -> dict[str, Any]:
    """Purpose of an answer, and the labels or streams that it tells of, for the audit log."""
    labels = {name: run.probe.tasks[name] for name in sorted({**result.get("sums", {}), **result.get("errors", {})})}
    told: dict[str, Any] = {"purpose": task.purpose.value, "labels": labels}
    if "inputs" in result:
        told["streams"] = sorted(result["inputs"])
    if "score" in result:
        told["labels"] = {task.column: sorted(result["score"])}
    return told


def _check_asked(session: Session, task: SumsTask, limits: LimitsConfig) -> bool:
    """Whether the question is about labels. Raises as `sum_patients`."""
    run = session.run
    if (label := privacy_label(run)) != "none":
        raise ProtocolError(f"sums are not covered by the run's claim ({label})")
    if task.purpose is Purpose.GATE and run.gate is None:
        raise ProtocolError("gate: this run has no [gate]")
    with_labels = task.purpose is not Purpose.GATE or (run.gate is not None and run.gate.measure == "labels")
    if with_labels and not run.probe.tasks:
        raise ProtocolError("probe.tasks: this run has no tasks")
    needed = Releasable.LABEL_SUMS if with_labels else Releasable.LOSS
    if needed not in limits.may_leave:
        raise LimitError.of_question(f"this site's limits.may-leave lacks {needed.value}")
    if task.purpose is not Purpose.GATE and task.model.round_number != run.train.rounds + 1:
        raise ProtocolError(f"{task.purpose}: asked before round {task.model.round_number}, expected after the last")
    return with_labels


def _sum_inputs(
    session: Session, task: SumsTask, states: StateStore, limits: LimitsConfig
) -> dict[str, dict[str, NDArray[np.float64]]]:
    """Sums over the inputs of each stream that lacks its constants and that enough training subjects hold. Raises as
    `sum_patients`."""
    run, store = session.run, session.store
    if (label := privacy_label(run)) != "none":
        raise ProtocolError(f"sums are not covered by the run's claim ({label})")
    if not run.summed_streams or task.model.round_number != 1:
        raise ProtocolError("inputs: asked for sums, expected before round 1 of a run that lacks constants")
    if Releasable.INPUT_SUMS not in limits.may_leave:
        raise LimitError.of_question(f"this site's limits.may-leave lacks {Releasable.INPUT_SUMS.value}")
    names = [name for name in run.summed_streams if name in session.streams]
    if not names:
        raise LimitError.of_question("inputs: too few training subjects of this site hold any of the streams")
    train = store.indices("train")
    _pin_inputs(states.folder.parents[1], session, {name: store.holders(train, [name]) for name in names})
    _note(states, session, task, "")
    tokenizer = run.model.tokenizer
    return {name: InputSums.of(store, name, run.streams[name], tokenizer, train).to_arrays() for name in names}


def _validation_loss(session: Session, task: SumsTask, states: StateStore) -> dict[str, Any]:
    """Summed loss of the val split under the server's parameters, and heads and teacher of this site."""
    state_round = session.load_private(task.model.round_number, states)
    session.load_global(task.model, state_round)
    _note(states, session, task, states.digest(state_round))
    indices = session.store.indices("val")
    validation = session.trainer.validate(session.store, indices, site=session.site)
    if not validation.subjects or not session.floors.is_enough(min(len(indices), validation.subjects)):
        raise LimitError.of_question("gate.measure: this site has too few patients for validation")
    return {"loss": validation.loss * len(indices), "loss_subjects": len(indices)}


def read_targets(
    folder: Path,
    site: SiteConfig,
    store: ImageStore,
    tasks: Mapping[str, tuple[str, ...]],
    at: NDArray[np.int64],
) -> dict[str, NDArray[np.float64]]:
    """Label values [n, C] of the tasks whose labels are all columns of the site's table, NaN where unknown.

    Args:
        at: Indices of the n subjects in the store.
    Raises:
        DataError: the table does not hold.
    """
    if site.labels is None:
        return {}
    named = {name for names in tasks.values() for name in names}
    table = numbers_of(read_site_cells(folder, site), named)
    rows = {subject_key(subject): row for row, subject in enumerate(table.subjects)}
    padded = np.vstack([table.values, np.full((1, len(table.names)), np.nan)])
    values = padded[[rows.get(subject_key(store.subjects[index]), -1) for index in at]]
    columns = {name: column for column, name in enumerate(table.names)}
    return {
        task: values[:, [columns[name] for name in names]]
        for task, names in tasks.items()
        if all(name in columns for name in names)
    }


def read_paths(task: SumsTask, features: int, tasks: Mapping[str, tuple[str, ...]]) -> dict[str, RidgePath]:
    """The ridge paths of a question. Raises ProtocolError: one does not hold, or is of no task of the run."""
    if unknown := sorted(set(task.paths) - set(tasks)):
        raise ProtocolError(f"ridge path of {unknown[0]!r:.80}, which the run does not name")
    return {
        name: RidgePath.from_arrays(parts, features=features, labels=len(tasks[name]))
        for name, parts in task.paths.items()
    }


def _pin(state_dir: Path, session: Session, targets: Mapping[str, NDArray[np.float64]]) -> None:
    """Note what this site sums: tasks, patients and their labels. Answers about others could be subtracted from it.

    Raises:
        LimitError: the site has summed other tasks, patients or labels before, in any run.
        DataError: the note is corrupted.
    """
    subjects = [session.store.subjects[index] for index in session.store.indices("train")]
    digest = hashlib.sha256(json.dumps([session.floors.batch, subjects]).encode())
    for task, values in sorted(targets.items()):
        digest.update(json.dumps([task, session.run.probe.tasks[task]]).encode() + values.tobytes())
    path, text = state_dir / SUMMED, digest.hexdigest().encode()
    state_dir.mkdir(parents=True, exist_ok=True)
    with locked(state_dir / f".{SUMMED}.lock", wait_s=_LOCK_WAIT_S):
        if not path.exists():
            write_checked(path, text)
        if read_checked(path) != text:
            raise LimitError.of_question("this site has summed other tasks, patients or labels before")


def _pin_inputs(state_dir: Path, session: Session, holders: Mapping[str, NDArray[np.int64]]) -> None:
    """Note of which patients and images this site sums the inputs, stream by stream: sums of others could be subtracted
    from them.

    Args:
        holders: Stream -> its training subjects, as indices into the store.
    Raises:
        LimitError: the site has summed the inputs of other patients or images of a stream before, in any run.
        DataError: the note is corrupted.
    """
    store, path = session.store, state_dir / SUMMED_INPUTS
    digests = {}
    for name, indices in holders.items():
        first = np.searchsorted(store.rows[name], indices)
        images = [store.digests[name][row].hex() for row in first] if name in store.digests else [""] * len(first)
        subjects = sorted(zip((store.subjects[index] for index in indices), images, strict=True))
        digests[name] = hashlib.sha256(json.dumps([session.floors.batch, subjects]).encode()).hexdigest()
    state_dir.mkdir(parents=True, exist_ok=True)
    with locked(state_dir / f".{SUMMED_INPUTS}.lock", wait_s=_LOCK_WAIT_S):
        known = json.loads(read_checked(path)) if path.exists() else {}
        if changed := [name for name in digests if known.get(name, digests[name]) != digests[name]]:
            raise LimitError.of_question(f"this site has summed other patients or images of {changed[0]} before")
        write_checked(path, json.dumps(known | digests).encode())


def _note(states: StateStore, session: Session, task: SumsTask, state: str) -> None:
    """Note a question on disk before it is answered. Raises ProtocolError if it was asked otherwise before.

    Args:
        state: Digest of the private state that decides the answer, if any does.
    """
    model, run = task.model, session.run
    paths = sorted(parameter_hashes(path_arrays(task.paths)).items())
    more = hashlib.sha256(json.dumps([paths, state]).encode()).hexdigest()
    digest = question_digest(dump_toml(run), model, model.groups, more)
    key = f"{task.purpose} before round {model.round_number}"
    known = read_asked(states.folder) or AskedRounds(run.train.rounds, 0.0)
    sums = {key: digest, **known.sums}
    if sums[key] != digest:
        raise ProtocolError(f"{key}: asked before with other parameters")
    newest = max(int(other.rpartition(" ")[2]) for other in sums)
    if key not in known.sums and model.round_number < newest:
        raise ProtocolError(f"{key}: asked after a question before round {newest}")
    write_asked(states.folder, run.train.rounds, known.digests, sums)
