"""The budget of a site's patients: which private runs the site pays for, and its ledger."""

from pathlib import Path

from panfm.config import RunConfig, SiteConfig, site_path
from panfm.errors import ConfigError, LimitError, ProtocolError
from panfm.privacy.guarantees import NO_CLAIM, broken_guarantees, claim
from panfm.privacy.ledger import Ledger, Limits, Permit
from panfm.sharing.messages import RoundTask
from panfm.site.audit_log import AuditLog


def check_privacy(run: RunConfig, site: SiteConfig) -> None:
    """Check that a run is as private as the site asks.

    A private run without a claim voids the ledger of all later ones, so only a site without a floor takes part in it.

    Raises:
        ProtocolError: it is less private.
        LimitError: it has noise and no claim, and the site sets a floor.
    """
    if site.limits.epsilon is None:
        if claim(run) == NO_CLAIM and site.limits.smallest_batch > 1:
            raise LimitError(
                "patient-dp: this run has noise but makes no claim, which would void this site's ledger, expected one"
            )
        return
    if run.patient_dp is None or run.patient_dp.acknowledge_broken_guarantee or claim(run) == NO_CLAIM:
        raise ProtocolError("this site's limits.epsilon allows private runs only, with their guarantee whole")


def with_public_subjects(run: RunConfig, site: SiteConfig) -> RunConfig:
    """Put the site's own public number of patients into a private run.

    Raises:
        ConfigError: with that number the run's guarantee does not hold.
    """
    if run.patient_dp is None or site.limits.public_subjects is None:
        return run
    private = run.patient_dp.model_copy(update={"public_subjects": site.limits.public_subjects})
    local = run.model_copy(update={"patient_dp": private})
    if claim(run) != NO_CLAIM:
        for fault in broken_guarantees(local):
            raise ConfigError(f"limits.public-subjects: {site.limits.public_subjects} patients: {fault}")
    return local


class PatientBudget:
    """A site's ledger, and the most that the site lets its patients spend."""

    def __init__(self, folder: Path, site: SiteConfig, state_dir: Path) -> None:
        self.ledger = Ledger(
            site_path(folder, site.ledger_dir),
            site.name,
            anchor_dir=state_dir,
            answered=AuditLog(state_dir).private_rounds,
        )
        self._site = site

    def pay(self, run: RunConfig, task: RoundTask, dataset: str) -> Permit:
        """Write a round into the ledger, under the stricter of the run's limits and the site's.

        Args:
            dataset: Fingerprint of the patients.
        Raises:
            ProtocolError: the run is less private than the site asks, or has mechanisms that cannot be accounted for.
            LimitError: the run makes no claim, and the site sets a floor.
            BudgetError, LedgerError: the site cannot pay.
        """
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
