"""Books private rounds in the ledger of a site. A worker imports it for its first private round."""

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from panfm.config import RunConfig, SiteConfig, site_path
from panfm.errors import LedgerError, LimitError
from panfm.privacy.guarantees import NO_CLAIM, claim
from panfm.sharing.messages import RoundTask
from panfm.site.audit_log import AuditLog

if TYPE_CHECKING:
    from panfm.hash_chain import Entry
    from panfm.privacy.ledger import Limits, Permit

_MOST_PAID = 3
"""Payments for one round within a day: a worker that dies in every try would spend the whole budget on it."""


class PatientBudget:
    """A site's privacy ledger, and the epsilon that the site lets its patients spend."""

    def __init__(self, folder: Path, site: SiteConfig, state_dir: Path) -> None:
        from panfm.privacy.ledger import Ledger  # imported here: only private runs need it

        self.ledger = Ledger(
            site_path(folder, site.ledger_dir),
            site.name,
            anchor_dir=state_dir,
            answered=AuditLog(state_dir).private_rounds,
        )
        self._site = site

    def pay(self, run: RunConfig, task: RoundTask, dataset: str) -> "Permit":
        """Write a round into the ledger, under the stricter of the run's limits and the site's.

        Args:
            dataset: Fingerprint of the patients.
        Raises:
            ProtocolError: the run is less private than the site asks, or has mechanisms that cannot be accounted for.
            LimitError: the round was paid for too often, or the run makes no privacy claim, and the site's
                `smallest-batch` is above 1.
            BudgetError, LedgerError: the site cannot pay.
        """
        limits = self._limits(run)
        since = (datetime.now(UTC) - timedelta(days=1)).isoformat(timespec="seconds")
        if sum(entry["time"] >= since for entry in self._entries_of(task)) >= _MOST_PAID:
            raise LimitError.of_question(
                f"round {task.round_number}: paid for {_MOST_PAID} times within a day, and ended without a reply"
            )
        return self.ledger.spend(run, task.run_id, task.round_number, limits=limits, dataset=dataset)

    def check_paid(self, run: RunConfig, task: RoundTask) -> None:
        """Check that a round is in the ledger, and that what is spent keeps within the limits as they are now.

        Raises:
            As `pay` does.
        """
        if not self._entries_of(task):
            raise LedgerError(f"{self.ledger.path}: lacks round {task.round_number} of {task.run_id}, which was paid")
        limits = self._limits(run)
        if claim(run) != NO_CLAIM:
            self.ledger.check_ahead(run, 0, limits=limits)

    def _entries_of(self, task: RoundTask) -> "list[Entry]":
        return [
            entry
            for entry in self.ledger.entries()
            if (entry.get("run"), entry.get("round")) == (task.run_id, task.round_number)
        ]

    def _limits(self, run: RunConfig) -> "Limits":
        """The stricter of the run's limits and the site's. Raises as `pay` does."""
        from panfm.privacy.ledger import Limits
        from panfm.site.admission import check_privacy  # imported here: commands that show the ledger need no torch

        assert run.patient_dp is not None
        check_privacy(run, self._site)
        site = self._site.limits
        epsilons = (run.patient_dp.epsilon, site.epsilon)
        deltas = (run.patient_dp.delta, site.delta, site.largest_delta)
        return Limits(
            min(epsilon for epsilon in epsilons if epsilon is not None),
            min(delta for delta in deltas if delta is not None),
        )
