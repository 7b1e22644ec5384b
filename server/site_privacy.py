"""The server's ledger under site-level privacy: one per run, in its run folder, written before noise is drawn."""

from collections.abc import Sequence
from pathlib import Path

from panfm.config import RunConfig
from panfm.privacy.ledger import Limits, run_ledger


class Account:
    """What a run may publish of its sites."""

    def __init__(self, run: RunConfig, folder: Path, run_id: str, sites: Sequence[str]) -> None:
        """Args: folder: the run folder."""
        assert run.server_privacy is not None
        self.ledger = run_ledger(folder)
        self._run = run
        self._run_id = run_id
        self._sites = ",".join(sites)
        self._limits = Limits(run.server_privacy.epsilon, run.server_privacy.delta)

    def check_ahead(self, num_rounds: int) -> None:
        """Raises BudgetError if so many more rounds would exceed the run's epsilon."""
        self.ledger.check_ahead(self._run, num_rounds, limits=self._limits)

    def pay(self, round_number: int) -> None:
        """Write a round down. Raises BudgetError or LedgerError."""
        self.ledger.spend(self._run, self._run_id, round_number, limits=self._limits, dataset=self._sites)
