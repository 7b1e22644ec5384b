"""Checks that a run is as private as a site asks, and books private rounds in its ledger. Imports no torch."""

from pathlib import Path
from typing import TYPE_CHECKING

from panfm.config import RunConfig, SiteConfig, site_path
from panfm.errors import LimitError, ProtocolError
from panfm.privacy.guarantees import NO_CLAIM, claim
from panfm.sharing.messages import RoundTask
from panfm.site.audit_log import AuditLog

if TYPE_CHECKING:
    from panfm.privacy.ledger import Permit


def check_privacy(run: RunConfig, site: SiteConfig) -> None:
    """Check that a run is as private as the site's limits ask.

    A private run without a claim voids the ledger of all later ones, so only a site with `smallest-batch = 1` takes
    part in it.

    Raises:
        ProtocolError: it is less private.
        LimitError: it adds noise but makes no privacy claim, and the site's `smallest-batch` is above 1.
    """
    if site.limits.epsilon is None:
        if claim(run) == NO_CLAIM and site.limits.smallest_batch > 1:
            raise LimitError(
                "patient-dp: this run has noise but makes no claim, which would void this site's ledger, expected one"
            )
        return
    if run.patient_dp is None or run.patient_dp.acknowledge_broken_guarantee or claim(run) == NO_CLAIM:
        raise ProtocolError("this site's limits.epsilon allows private runs only, with their guarantee whole")


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
