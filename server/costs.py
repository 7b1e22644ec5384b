"""What the rounds of a private run cost each site, by the public plan: sites do not tell what they have spent."""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from panfm.config import RunConfig


class PlannedCosts:
    """Counts the rounds in which each site was asked."""

    def __init__(self, run: RunConfig, rounds: Iterable[Mapping[str, Any]]) -> None:
        """Args: rounds: Lines of rounds.jsonl of the rounds done before."""
        self._run = run
        self._asked = Counter(site for line in rounds for site in line["asked"])
        self._known: dict[int, float | None] = {}

    def after(self, asked: Iterable[str]) -> dict[str, float | None]:
        """Site -> epsilon that the plan gives it once it has been asked in one more round; empty if nothing is
        promised."""
        if self._run.privacy is None:
            return {}
        self._asked.update(asked)
        costs = {site: self._cost(rounds) for site, rounds in sorted(self._asked.items())}
        return {} if None in costs.values() else costs

    def _cost(self, rounds: int) -> float | None:
        if rounds not in self._known:
            from panfm.privacy.statement import cost_of_rounds  # brings the accountant, which takes seconds

            self._known[rounds] = cost_of_rounds(self._run, rounds)
        return self._known[rounds]
