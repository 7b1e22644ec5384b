"""What a site puts between its patients and a private run: its own limits, and its ledger."""

import hashlib
from pathlib import Path

from panfm.config import RunConfig, SiteConfig, site_path
from panfm.config.privacy import NO_CLAIM, broken_guarantees, claim
from panfm.data.store import ImageStore
from panfm.errors import ConfigError, ProtocolError
from panfm.privacy.ledger import Ledger, Limits, Permit
from panfm.sharing.messages import RoundTask


def check_privacy(run: RunConfig, site: SiteConfig) -> None:
    """Raises ProtocolError if the run is less private than the site asks."""
    if site.limits.epsilon is None:
        return
    if run.privacy is None or run.privacy.acknowledge_broken_guarantee:
        raise ProtocolError("this site's limits.epsilon allows private runs only, with their guarantee whole")


def as_known(run: RunConfig, site: SiteConfig) -> RunConfig:
    """The run with the site's own public number of patients.

    Raises:
        ConfigError: with that number the run's guarantee does not hold.
    """
    if run.privacy is None or site.limits.public_subjects is None:
        return run
    private = run.privacy.model_copy(update={"public_subjects": site.limits.public_subjects})
    known = run.model_copy(update={"privacy": private})
    if claim(run) != NO_CLAIM:
        for fault in broken_guarantees(known):
            raise ConfigError(f"limits.public-subjects: {site.limits.public_subjects} patients: {fault}")
    return known


class Account:
    """A site's ledger, and the most it may spend."""

    def __init__(self, folder: Path, site: SiteConfig, state_dir: Path) -> None:
        self.ledger = Ledger(site_path(folder, site.ledger_dir), site.name, anchor_dir=state_dir)
        self._site = site.limits

    def pay(self, run: RunConfig, task: RoundTask, store: ImageStore) -> Permit:
        """Write a round into the ledger. Raises BudgetError or LedgerError."""
        assert run.privacy is not None
        limits = Limits(
            min(run.privacy.epsilon, self._site.epsilon or run.privacy.epsilon),
            min(run.privacy.delta, self._site.delta or run.privacy.delta),
        )
        return self.ledger.spend(run, task.run_id, task.round_number, limits=limits, dataset=fingerprint(store))


def fingerprint(store: ImageStore) -> str:
    """Digest of who is in the train split, so that the ledger tells when the patients changed."""
    names = sorted(store.subjects[index] for index in store.indices("train"))
    return hashlib.sha256("\n".join(names).encode()).hexdigest()[:16]
