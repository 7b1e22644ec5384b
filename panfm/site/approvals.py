"""Register of the decisions of a site's operator: which experiments may run here, until when, for how many rounds.

    kind           opened, approved or rejected
    time, by       when, and the operator's name
    experiment     hash of the description (`panfm.config.experiment_hash`)
    until          last day of an approval, YYYY-MM-DD; null: no end
    max-rounds     most rounds that an approval covers, counted over all runs of the experiment; null: no bound

The newest entry of an experiment decides. Lines are added and never changed, each bound to those before it by its
hash (hash_chain.py). The register lies beside the site's ledger, its anchor in the state folder: a register that was
changed, cut off or deleted is found, and the site then answers nothing. Without both every experiment is pending.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Self

from panfm.config import SiteConfig, site_path
from panfm.errors import DataError, LimitError, PendingApprovalError
from panfm.hash_chain import Entry, HashChain, sealed

FILE = "approvals.jsonl"
ANCHOR = "approvals.anchor"
_REMEDY = "move the register away and approve every experiment anew"


@dataclass(frozen=True)
class Decision:
    """The operator's decision on one experiment."""

    experiment: str
    """Hash of its description."""
    is_approved: bool
    by: str
    """Name of the operator."""
    time: str
    """When it was made, ISO 8601."""
    until: date | None = None
    """Last day of an approval; None: no end."""
    max_rounds: int | None = None
    """Most rounds that an approval covers; None: no bound."""

    @classmethod
    def of(cls, entry: Entry) -> Self:
        """Read a decision from its line."""
        until = entry.get("until")
        return cls(
            entry["experiment"],
            entry["kind"] == "approved",
            entry["by"],
            entry["time"],
            date.fromisoformat(until) if until else None,
            entry.get("max-rounds"),
        )

    def __str__(self) -> str:
        """The decision in words."""
        if not self.is_approved:
            return f"rejected by {self.by} on {self.time[:10]}"
        until = f", until {self.until}" if self.until else ""
        rounds = f", for {self.max_rounds} rounds in all" if self.max_rounds else ""
        return f"approved by {self.by} on {self.time[:10]}{until}{rounds}"


class Approvals:
    """The register of one site, as the worker reads it; operators write it (decisions.py)."""

    def __init__(self, folder: Path, site: SiteConfig) -> None:
        """Name the register of a site folder; nothing is read or written yet."""
        self.path = site_path(folder, site.ledger_dir) / FILE
        self._site = site.name
        anchor = site_path(folder, site.state_dir) / ANCHOR
        self.chain = HashChain(self.path, sealed, key="chain", anchor=anchor)

    def decisions(self) -> dict[str, Decision]:
        """Return experiment -> the newest decision on it, the newest decision last.

        Raises:
            DataError: the register was changed or cut off, is another site's, or cannot be read.
        """
        with self.chain.reading() as file:
            entries = self.checked(file.read())
        newest: dict[str, Decision] = {}
        for entry in entries[1:]:
            newest.pop(entry["experiment"], None)
            newest[entry["experiment"]] = Decision.of(entry)
        return newest

    def checked(self, content: bytes) -> list[Entry]:
        """Entries of the register's content. Raises DataError as `decisions` does."""
        entries = list(self.chain.verified(content))
        self.chain.check_anchor(entries, _REMEDY)
        if entries and (entries[0].get("kind"), entries[0].get("site")) != ("opened", self._site):
            raise DataError(f"{self.path}: is not the register of site {self._site}, expected the one it has written")
        return entries


def check_approved(
    experiment: str,
    decision: Decision | None,
    *,
    asked: tuple[str, int] | None = None,
    answered: Callable[[], Collection[tuple[str, int]]] = tuple,
    today: date | None = None,
) -> None:
    """Check that the operator lets an experiment run now.

    Args:
        decision: The newest one on it.
        asked: Run id and number of the round that is asked for; None for a handshake or sums.
        answered: Reads which rounds of the experiment were answered; called for an approval with a bound only.
        today: The day of the question, by the clock of this machine when left out.
    Raises:
        PendingApprovalError: there is no decision yet, or the approval has run out.
        LimitError: the operator has rejected it.
    """
    if decision is None:
        raise _pending(f"experiment {experiment} waits for this site's approval: panfm site requests, approve")
    if not decision.is_approved:
        raise LimitError.of_question(f"experiment {experiment} is rejected by this site's operator")
    if decision.until and (today or date.today()) > decision.until:
        raise _pending(f"experiment {experiment}: this site's approval ended on {decision.until}")
    if asked and decision.max_rounds is not None:
        rounds = set(answered())
        if asked not in rounds and len(rounds) >= decision.max_rounds:
            raise _pending(f"experiment {experiment}: this site's approval covers {decision.max_rounds} rounds")


def _pending(text: str) -> PendingApprovalError:
    return PendingApprovalError(text, public=text)
