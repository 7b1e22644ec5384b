"""Evaluation at sites: each site scores a finished run's model on its own labels, and tells AUC or R2.

    1. shake hands with the sites that are online                                      handshake.py
    2. for each column ask them, with the parameters of the model                      exchange.py
       a site decides what it answers                                                  panfm/site/evaluation_answer.py
    3. write the scores into `evaluation.json`, and the report anew if there is one    panfm/report/site_evaluation.py

A site that tells nothing, or answers badly, is left out and named with its reason. Nothing else of the run changes.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Literal

from flwr.serverapp import Grid

from panfm.config import RunConfig
from panfm.errors import PanfmError, ProtocolError, RunError
from panfm.evaluate.label_sums import checked_arrays
from panfm.files import locked
from panfm.models import describe_model
from panfm.models.packing import trained_manifest
from panfm.privacy.guarantees import load_checked_run, privacy_label
from panfm.report.report_page import FILE as REPORT
from panfm.report.report_page import write_report
from panfm.report.run_files import read_run
from panfm.report.site_evaluation import ColumnScores, SiteEvaluation, SiteResult, read_evaluation, write_evaluation
from panfm.sharing.sums_messages import Purpose, SumsReply
from server.exchange import ask_sums
from server.flower_cli import of_one_word
from server.handshake import shake_hands
from server.run_folder import RunFolder

_MOST_PATIENTS = 10
"""Patients behind a score over those that the site trains on."""


def check_can_be_evaluated(run: RunConfig, columns: Sequence[str]) -> None:
    """Raise RunError for a private run, or for columns that are not named once each."""
    if (label := privacy_label(run)) != "none":
        raise RunError(f"a private run ({label}): exact scores are outside its claim, and no site gives any")
    if not columns or not all(columns) or len({*columns}) < len(columns):
        raise RunError("--task: expected one or more columns of the sites' label tables, each once")


def evaluate_run(grid: Grid, path: Path, columns: str, *, num_sites: int | None = None) -> None:
    """Ask the sites to evaluate the model of a run, and write their scores; a failure is written down as well.

    Args:
        path: Folder of a run that has finished.
        columns: Of the sites' label tables, as one word (flower_cli.py).
        num_sites: Of a simulation; None: real sites.
    Raises:
        PanfmError: the run is private or has not finished, too few sites are online, or its model is damaged.
    """
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(path / ".evaluation.lock", wait_s=0.0))
        except BlockingIOError as error:
            raise RunError(f"{path}: another evaluation is at work") from error
        known = read_evaluation(path)
        try:
            run = load_checked_run(path / "run.toml")
            scores = _ask(grid, RunFolder(path, run), of_one_word(columns), num_sites)
        except PanfmError as error:
            write_evaluation(path, known.model_copy(update={"failure": str(error)}))
            raise
        write_evaluation(path, SiteEvaluation(columns={**known.columns, **scores}))
    if (path / REPORT).exists():
        write_report(read_run(path))


def _ask(grid: Grid, folder: RunFolder, columns: Sequence[str], num_sites: int | None) -> dict[str, ColumnScores]:
    """Column -> what the sites that are online answer."""
    run = folder.shared_run
    check_can_be_evaluated(run, columns)
    state, frozen = folder.final_state()
    manifest = trained_manifest(describe_model(run), run.sharing)
    attendance = shake_hands(grid, run, manifest, num_sites=num_sites, expected=folder.expected_sites())
    attendance.leave_out_misfits()
    absent = {node: reason for node, _, reason in (line.partition(": ") for line in attendance.failed)}
    subjects = {handshake.site: handshake.subjects for handshake in attendance.roster.values()}
    scores = {}
    for column in columns:
        answers = ask_sums(grid, run, state, attendance.roster, Purpose.EVALUATION, frozen=frozen, column=column)
        read, refused = answers.read(_score)
        for site in [site for site, score in read.items() if score.patients > _MOST_PATIENTS * subjects[site]]:
            refused[site] = f"a score of {read.pop(site).patients} patients, the site trains on {subjects[site]}"
        scores[column] = ColumnScores(sites=read, left_out={**absent, **answers.failed, **refused})
    return scores


def _score(reply: SumsReply) -> SiteResult:
    """Read a site's answer. Raises ProtocolError: it holds no score."""
    metric: Literal["auc", "r2"] = "auc" if "auc" in reply.score else "r2"
    if not reply.scored or not 0 < reply.scored <= 10**9:
        raise ProtocolError("evaluation: expected the number of patients behind a score")
    value, low, high, held_out = checked_arrays(reply.score, {metric: (4,)})[metric].tolist()
    least = 0.0 if metric == "auc" else -1.0
    if not (least <= low <= high <= 1.0 and least <= value <= 1.0 and held_out in (0.0, 1.0)):
        raise ProtocolError(f"evaluation: no {metric} with its interval, expected {least:g} to 1")
    return SiteResult(metric=metric, value=value, low=low, high=high, patients=reply.scored, held_out=bool(held_out))
