"""A site's answer to a question for an evaluation: how well a run's global model tells one column of its label table.

    the column is the run's [task]    the head that the run trained, on held-out patients
    any other                         a ridge regression of the site's own on the frozen features
                                      (panfm/evaluate/site_score.py)

Only columns that `limits.evaluation-labels` names, only after a run's last round, and in no private run: exact numbers
are outside its claim. A server chooses the parameters that are evaluated, and can learn a little of a patient from each
answer. So all answers on a column, of heads and of probes each, are about the same patients and labels, and about
`limits.evaluations` models at most, in whatever run; `evaluations.json` beside the private states notes them before an
answer is computed.

Whatever the data decide (no such column, too few patients of a class, values that are no labels) is refused in the same
words.
"""

import hashlib
import json
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from panfm.config import Releasable, SiteConfig, dump_toml
from panfm.config.site_description import LimitsConfig
from panfm.data.label_kinds import encode, infer_kinds, read_rules
from panfm.data.labels import Labels, read_site_cells
from panfm.data.subjects import subject_key
from panfm.errors import LimitError, ProtocolError
from panfm.evaluate.label_sums import MAX_FEATURES, Floats
from panfm.evaluate.site_score import SiteScore, cross_validated, enough_of, probed, scored
from panfm.files import locked, read_checked, write_checked
from panfm.models import describe_model
from panfm.models.pan import TASK_HEAD
from panfm.privacy.guarantees import privacy_label
from panfm.sharing.sums_messages import SumsTask
from panfm.site.asked_model import embed_patients, load_model
from panfm.site.session import Session
from panfm.site.state import StateStore, question_digest

_LOCK_WAIT_S = 10.0
EVALUATIONS = "evaluations.json"
"""Beside the runs: head or probe, and column -> digest of patients and labels, digests of questions answered."""


def evaluate_column(
    session: Session, task: SumsTask, states: StateStore, *, folder: Path, site: SiteConfig
) -> SiteScore:
    """Evaluate the model of a question on a column of the site's label table.

    Raises:
        ProtocolError: the run is private or has rounds to come, or the parameters do not fit.
        LimitError: this site does not let the column be evaluated, or no more; or its patients do not give a score.
        DataError: the label table or the private state is faulty.
    """
    _check_asked(session, task, site.limits)
    is_own_task = session.run.task is not None and session.run.task.label == task.column
    labels, is_number = _own_labels(session) if is_own_task else _read_column(session, folder, site, task.column)
    known: NDArray[np.bool_] = np.asarray(np.isfinite(labels).all(axis=1))
    train, test = (at[known[at]] for at in map(session.store.indices, ("train", "test")))
    floor = session.floors.batch
    has_test = len(test) > 0
    if is_own_task:
        train = test
    kept = enough_of(labels[train], floor)
    if has_test:
        kept = kept & enough_of(labels[test], floor)
    if not kept.any():
        raise _refusal(task.column)
    at = np.union1d(train, test)
    targets = labels[at][:, kept]
    key = f"{'head' if is_own_task else 'probe'} {task.column}"
    question = question_digest(dump_toml(session.run), task.model, task.model.groups, task.column)
    note_evaluated(states.folder.parents[1], session, question, key, at, targets, site.limits)
    load_model(session, task, states)
    is_test = np.isin(at, test)
    if is_own_task:
        predicted = _head_outputs(session, at)[:, kept]
    else:
        features = embed_patients(session, at)
        among = np.flatnonzero(np.isin(at, train))
        predicted = probed(features, targets, among) if has_test else cross_validated(features, targets)
    told = is_test if has_test else np.ones(len(at), dtype=bool)
    score = scored(predicted[told], targets[told], is_number=is_number, is_held_out=has_test)
    if not np.isfinite([score.value, score.low, score.high]).all():
        raise _refusal(task.column)
    return score


def _check_asked(session: Session, task: SumsTask, limits: LimitsConfig) -> None:
    """Raises as `evaluate_column`, by the question alone."""
    if (label := privacy_label(session.run)) != "none":
        raise ProtocolError(f"an evaluation is not covered by the run's claim ({label})")
    named = limits.evaluation_labels
    if Releasable.EVALUATION not in limits.may_leave or not (named == "all" or task.column in named):
        raise LimitError.of_question(
            f"this site's limits.evaluation-labels lacks {task.column!r}, its operator may add it"
        )
    if task.model.round_number != session.run.train.rounds + 1:
        raise ProtocolError(f"evaluation: asked before round {task.model.round_number}, expected after the last")
    if (size := describe_model(session.run).embedding_size) > MAX_FEATURES:
        raise ProtocolError(f"evaluation: embeddings have {size} numbers, expected at most {MAX_FEATURES}")


def _refusal(column: str) -> LimitError:
    return LimitError.of_question(
        f"evaluation: {column!r:.140}: too few patients of this site have such a label, or it is none"
    )


def _own_labels(session: Session) -> tuple[Floats, bool]:
    """Labels [subjects, K] of the run's task as it trains on them, and whether they are numbers."""
    assert session.run.task is not None
    assert session.store.labels is not None
    return session.store.labels.astype(np.float64), session.run.task.kind == "number"


def _read_column(session: Session, folder: Path, site: SiteConfig, column: str) -> tuple[Floats, bool]:
    """Labels [subjects, K] of a column, NaN where unknown, and whether they are numbers. Raises as
    `evaluate_column`."""
    if site.labels is None or column not in (table := read_site_cells(folder, site)).cells:
        raise _refusal(column)
    kind = infer_kinds([table], read_rules([table])).by_column[column]
    labels = encode(table, {column: kind})
    if not labels.names:
        raise _refusal(column)
    return _in_order(labels, session.store.subjects), kind.kind == "number"


def _in_order(labels: Labels, subjects: tuple[str, ...]) -> Floats:
    rows = {subject_key(subject): row for row, subject in enumerate(labels.subjects)}
    padded = np.vstack([labels.values, np.full((1, len(labels.names)), np.nan)])
    return padded[[rows.get(subject_key(subject), -1) for subject in subjects]]


@torch.inference_mode()
def _head_outputs(session: Session, at: NDArray[np.int64]) -> Floats:
    """Outputs [n, K] of the run's task head for some subjects."""
    model, size = session.trainer.model.eval(), session.run.train.batch_size
    head, streams = model.heads.get_submodule(TASK_HEAD), list(session.streams)
    batches = [session.store.batch(at[start : start + size], streams) for start in range(0, len(at), size)]
    outputs = [head(model.embed(batch.to(session.trainer.device))) for batch in batches]
    return torch.cat(outputs).double().cpu().numpy()


def note_evaluated(
    state_dir: Path,
    session: Session,
    question: str,
    key: str,
    at: NDArray[np.int64],
    targets: Floats,
    limits: LimitsConfig,
) -> None:
    """Note what is asked, and about whom, on disk before it is answered.

    Args:
        question: Digest of the model and what is asked of it.
        key: Columns, and what is scored on them (a head, a probe, the val split): each has patients of its own.
    Raises:
        LimitError: they were evaluated on other patients or labels before, or for `limits.evaluations` models.
        DataError: the note is corrupted.
    """
    store = session.store
    about = [[store.subjects[index], store.splits[index]] for index in at]
    patients = hashlib.sha256(json.dumps([about, targets.tolist()]).encode()).hexdigest()
    path = state_dir / EVALUATIONS
    state_dir.mkdir(parents=True, exist_ok=True)
    with locked(state_dir / f".{EVALUATIONS}.lock", wait_s=_LOCK_WAIT_S):
        known = json.loads(read_checked(path)) if path.exists() else {}
        before, questions = known.get(key, [patients, []])
        if before != patients:
            raise LimitError.of_question(
                f"evaluation: {key.partition(' ')[2]!r:.140}: this site has told of other patients"
            )
        if question not in questions and len(questions) >= limits.evaluations:
            raise LimitError.of_question(f"this site's limits.evaluations is {limits.evaluations}")
        write_checked(path, json.dumps({**known, key: [patients, sorted({*questions, question})]}).encode())
