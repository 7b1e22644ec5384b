"""Books private rounds in the ledger of a site. A worker imports it for its first private round."""

from pathlib import Path
from typing import TYPE_CHECKING

from panfm.config import RunConfig, SiteConfig, site_path
from panfm.sharing.messages import RoundTask
from panfm.site.audit_log import AuditLog

if TYPE_CHECKING:
    from panfm.privacy.ledger import Permit


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
            LimitError: the run makes no privacy claim, and the site's `smallest-batch` is above 1.
            BudgetError, LedgerError: the site cannot pay.
        """
        from panfm.privacy.ledger import Limits
        from panfm.site.admission import check_privacy  # imported here: commands that show the ledger need no torch

        assert run.patient_dp is not None
        check_privacy(run, self._site)
        site = self._site.limits
        epsilons = (run.patient_dp.epsilon, site.epsilon)
        deltas = (run.patient_dp.delta, site.delta, site.largest_delta)
        limits = Limits(
            min(epsilon for epsilon in epsilons if epsilon is not None),
            min(delta for delta in deltas if delta is not None),
        )
        return self.ledger.spend(run, task.run_id, task.round_number, limits=limits, dataset=dataset)
