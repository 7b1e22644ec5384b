"""What a site puts between its patients and a private run: its own limits, and its ledger."""

import hashlib
from pathlib import Path

import numpy as np

from panfm.config import RunConfig, SiteConfig, site_path
from panfm.data.store import ImageStore
from panfm.errors import ConfigError, LimitError, ProtocolError
from panfm.privacy.guarantees import NO_CLAIM, broken_guarantees, claim
from panfm.privacy.ledger import Ledger, Limits, Permit
from panfm.sharing.messages import RoundTask
from panfm.site.departures import Departures

_SAMPLE = 1024
"""Numbers from the middle of an image that tell it from others."""


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
                "privacy: this run has noise but makes no claim, which would void this site's ledger; expected a claim"
            )
        return
    if run.privacy is None or run.privacy.acknowledge_broken_guarantee or claim(run) == NO_CLAIM:
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
        departures = Departures(state_dir)
        self.ledger = Ledger(
            site_path(folder, site.ledger_dir), site.name, anchor_dir=state_dir, departed=departures.private_rounds
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
        assert run.privacy is not None
        check_privacy(run, self._site)
        site = self._site.limits
        epsilons = (run.privacy.epsilon, site.epsilon)
        deltas = (run.privacy.delta, site.delta, site.largest_delta)
        limits = Limits(
            min(epsilon for epsilon in epsilons if epsilon is not None),
            min(delta for delta in deltas if delta is not None),
        )
        return self.ledger.spend(run, task.run_id, task.round_number, limits=limits, dataset=dataset)


def fingerprint(store: ImageStore) -> str:
    """Digest of who is in the train split, with which images: it tells when patients or images changed.

    An image counts by its shape and the numbers in its middle, which is quick whatever its size: another image shows, a
    change elsewhere in the same image may not.
    """
    digest = hashlib.sha256()
    train = store.indices("train")
    for stream in sorted(store.images):
        images, rows = store.images[stream], store.rows[stream]
        digest.update(f"{stream} {images.shape[1:]}\0".encode())
        positions = {store.subjects[rows[position]]: position for position in np.flatnonzero(np.isin(rows, train))}
        for subject, position in sorted(positions.items()):
            image = images[position].reshape(-1)
            start = max(len(image) - _SAMPLE, 0) // 2
            digest.update(subject.encode() + b"\0" + image[start : start + _SAMPLE].tobytes())
    return digest.hexdigest()[:16]
