"""Counts the privacy cost of rounds at the server: its ledger under site-level privacy, and the public plan of private
runs."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from panfm.config import RunConfig
from panfm.privacy.ledger import Limits, run_ledger


class SiteDpBudget:
    """Budget of a run under site-level privacy."""

    def __init__(self, run: RunConfig, folder: Path, run_id: str, sites: Sequence[str]) -> None:
        """Args: folder: the run folder."""
        assert run.site_dp is not None
        self.ledger = run_ledger(folder)
        self._run = run
        self._run_id = run_id
        self._sites = ",".join(sites)
        self._limits = Limits(run.site_dp.epsilon, run.site_dp.delta)

    def check_ahead(self, num_rounds: int) -> None:
        """Raises BudgetError if so many more rounds would exceed the run's epsilon."""
        self.ledger.check_ahead(self._run, num_rounds, limits=self._limits)

    def pay(self, round_number: int) -> None:
        """Write a round into the ledger. Raises BudgetError or LedgerError."""
        self.ledger.spend(self._run, self._run_id, round_number, limits=self._limits, dataset=self._sites)


class PlannedCosts:
    """Epsilon of each site by the public plan, from the rounds in which it was asked."""

    def __init__(self, run: RunConfig, rounds: Iterable[Mapping[str, Any]]) -> None:
        """Args: rounds: Lines of rounds.jsonl of the rounds done before."""
        self._run = run
        self._asked = Counter(site for line in rounds for site in line["asked"])
        self._known: dict[int, float | None] = {}

    def after(self, asked: Iterable[str]) -> dict[str, float | None]:
        """Count one more round of the asked sites; return site -> its epsilon so far, empty without a promise."""
        if self._run.patient_dp is None:
            return {}
        self._asked.update(asked)
        costs = {site: self._cost(rounds) for site, rounds in sorted(self._asked.items())}
        return {} if None in costs.values() else costs

    def _cost(self, rounds: int) -> float | None:
        if rounds not in self._known:
            from panfm.privacy.statement import cost_of_rounds  # brings the accountant, which takes seconds

            self._known[rounds] = cost_of_rounds(self._run, rounds)
        return self._known[rounds]
