"""The privacy ledger: the budget that a site's private rounds have spent, shared by all runs on its patients. (A server
that adds noise for its sites keeps one per run.)

    <ledger-dir>/ledger.jsonl     one line per entry: the first opens the ledger, every other is one private round

The file is a hash chain (hash_chain.py), and its anchor is kept with the private state: a ledger without its anchor is
refused, and so is an anchor without its ledger. Whoever can write both files can cut both: the audit log of the site
still tells what was spent, and a ledger that holds less is refused. A hash of its end that somebody noted elsewhere
shows whether all three were cut (`panfm ledger verify --noted`). A round is written and synced to disk *before* it
runs: a crash counts too much, never too little.
"""

import hashlib
import json
import math
import secrets
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from io import BufferedRandom
from pathlib import Path
from typing import IO, Any

from panfm.config import RunConfig
from panfm.config.base import LEAST_NOISE
from panfm.errors import BudgetError, DataError, LedgerError
from panfm.hash_chain import Entry, HashChain, Position
from panfm.privacy.guarantees import NO_CLAIM, claim, site_dp_claim
from panfm.privacy.mechanisms import Mechanism, Unit, check_mechanism, epsilon, merged, planned

FILE = "ledger.jsonl"
ANCHOR = "ledger.anchor"
_REMEDY = "vouch for the ledger: panfm ledger verify FOLDER --noted END"
_ACCOUNTANT_ERROR = 0.02
"""How far two of the accountant's upper bounds of one number may lie apart."""
_OPENING = {
    "patient": {"unit": "patient", "relation": "add-or-remove-one", "sampling": "Poisson, secret"},
    "site": {"unit": "site", "relation": "zero-out", "sampling": "none: all sites in every round"},
}


@dataclass
class Permit:
    """Permission to run one round's mechanisms, once. Only `Ledger.spend` makes one."""

    run_id: str
    round_number: int
    mechanisms: tuple[Mechanism, ...]
    claim: str
    """Privacy claim of the round."""
    _is_used: bool = field(default=False, repr=False)

    def use(self) -> None:
        """Use the permit up. Raises LedgerError the second time."""
        if self._is_used:
            raise LedgerError(f"permit: round {self.round_number} of {self.run_id} ran already, expected a new permit")
        self._is_used = True


@dataclass(frozen=True)
class AnsweredRounds:
    """Private rounds of a site by its audit log."""

    count: int = 0
    """Rounds that were answered; a round that was paid for and not answered is none."""
    epsilon: float | None = None
    """Epsilon of the ledger when a message of a private run left last."""


@dataclass(frozen=True)
class Limits:
    """Largest epsilon and delta of a round: the smaller of the run's and the site's."""

    epsilon: float
    delta: float

    def __post_init__(self) -> None:
        if not (self.epsilon > 0.0 and 0.0 < self.delta < 1.0):
            raise LedgerError(
                f"limits: epsilon {self.epsilon:g} and delta {self.delta:g}, expected epsilon > 0 and delta in (0, 1)"
            )


@dataclass
class _Balance:
    """Sum of the entries of a verified ledger."""

    counts: Counter[Mechanism] = field(default_factory=Counter)
    """How often each mechanism, of count 1, was applied."""
    greatest: dict[float, float] = field(default_factory=dict)
    """Delta -> largest epsilon that was booked at it."""
    newest: float | None = None
    """Epsilon after the newest round."""
    has_unclaimed: bool = False
    """Whether a round ran although something broke its guarantee."""

    def add(self, entry: Entry) -> None:
        """Add the next entry."""
        for mechanism in mechanisms_of(entry):
            self.counts[replace(mechanism, count=1)] += mechanism.count
        if entry["kind"] == "round":
            self.newest = entry["epsilon"]
            self.greatest[entry["delta"]] = max(entry["epsilon"], self.greatest.get(entry["delta"], 0.0))
            self.has_unclaimed |= entry["claim"] == NO_CLAIM

    def mechanisms(self) -> list[Mechanism]:
        """All mechanisms so far, equal ones as one."""
        return [replace(mechanism, count=count) for mechanism, count in self.counts.items()]

    def least(self, delta: float) -> float:
        """Lower bound on the epsilon after a further entry at this delta: epsilon grows with every round, and with a
        smaller delta."""
        return max((spent for booked, spent in self.greatest.items() if booked >= delta), default=0.0)


class Ledger:
    """The ledger of one site and its data set, or of a run's server.

    Guarantees:
        append-only: an entry that was changed, moved or removed is found before anything more is spent. (What was
            changed within a few ms of this process's own last entry is found when a ledger is opened next.)
        monotone: what is booked is a number, at least 0, and no less than an earlier entry at that delta or a larger.
        spent first: `spend` returns after the entry is on disk, and mechanisms run after `spend`.
        bounded: no entry is written with which the limits would be exceeded.
    """

    def __init__(
        self,
        folder: Path,
        site: str,
        *,
        anchor_dir: Path | None = None,
        unit: Unit = "patient",
        answered: Callable[[], AnsweredRounds] = AnsweredRounds,
    ) -> None:
        """Name a ledger, which is there or is opened by the first `spend`.

        Args:
            folder: Where the file lies; all runs on these patients share it.
            site: Public name of the site, or "server".
            anchor_dir: Folder of the anchor; there is none when left out.
            unit: Whom it protects: a site's patients, or a server's sites.
            answered: Reads the private rounds of the audit log; called whenever the whole ledger is read.
        """
        self.path = folder / FILE
        self.site = site
        self.unit: Unit = unit
        self._chain = HashChain(
            self.path, _sealed, key="hash", anchor=anchor_dir / ANCHOR if anchor_dir else None, error=LedgerError
        )
        self._answered = answered
        self._balance = _Balance()
        self._position = Position()
        """Of the file that the balance was verified on."""

    def spend(self, run: RunConfig, run_id: str, round_number: int, *, limits: Limits, dataset: str) -> Permit:
        """Add a round, if the budget covers it.

        Args:
            run: The run's description.
            limits: Of the run and the site together.
            dataset: Fingerprint of the patients, or names of the sites.
        Raises:
            ProtocolError: a mechanism of the run cannot be accounted for, or has too little noise for its claim.
            BudgetError: with this round more than `limits` would be spent; nothing is written.
            LedgerError: the run breaks its guarantee and does not acknowledge it; the file or its anchor is missing,
                another site's, or does not hold.
        """
        mechanisms = planned(run, self.unit)
        promise = claim(run) if self.unit == "patient" else site_dp_claim(run)
        assert promise is not None
        acknowledged = self.unit == "patient" and run.patient_dp and run.patient_dp.acknowledge_broken_guarantee
        for mechanism in mechanisms:
            check_mechanism(mechanism, least_noise=0.0 if acknowledged else LEAST_NOISE)
        if promise == NO_CLAIM and not acknowledged:
            raise LedgerError(f"{self.path}: round {round_number} claims nothing, expected one that keeps its promise")
        with self._chain.writing() as file:
            balance = self._verified(file)
            spent = self._cost(balance, mechanisms, limits)
            if promise != NO_CLAIM:
                self._check_budget(balance, spent, limits, f"round {round_number}")
            if not self._position.size:
                self._append(file, self._opening())
            entry = {
                "kind": "round",
                "run": run_id,
                "round": round_number,
                "mechanisms": [asdict(mechanism) for mechanism in mechanisms],
                "delta": limits.delta,
                "epsilon": spent,
                "limit": limits.epsilon,
                "claim": promise,
                "dataset": dataset,
            }
            self._append(file, entry)
        return Permit(run_id, round_number, mechanisms, promise)

    def entries(self) -> list[Entry]:
        """All entries, checked; none if there is no ledger yet. Writes nothing, so whoever may read it may ask.

        Raises:
            LedgerError: the file does not hold, or cannot be read.
        """
        with self._chain.reading() as file:
            return self._checked(file.read())

    def spent(self) -> float | None:
        """Epsilon after the newest round, None before the first. Raises LedgerError as `entries` does."""
        with self._chain.reading() as file:
            return self._verified(file).newest

    def check_noted(self, noted: str) -> bool:
        """Check that an end of the chain, which somebody noted earlier, is still in the ledger, and that the ledger
        holds what was spent by the audit log. If there is no anchor it is then written anew: the note vouches for the
        entries up to the noted one, and the audit log for those behind it.

        Returns:
            Whether the anchor was written.
        Raises:
            LedgerError: the end is not in the ledger, more was spent by the audit log, or the file does not hold.
        """
        with self._chain.reading() as file:
            is_anchored = self._chain.anchor is None or self._chain.anchor.exists()
            content = file.read()
            entries = self._checked(content) if is_anchored else self._checked_without_anchor(content)
            self._chain.check_noted(entries, noted)
            if not is_anchored:
                self._chain.write_anchor(entries[-1]["hash"])
            return not is_anchored

    def check_ahead(self, run: RunConfig, num_rounds: int, *, limits: Limits) -> None:
        """Raises BudgetError if so many more rounds do not fit; writes nothing."""
        with self._chain.reading() as file:
            balance = self._verified(file)
        spent = self._cost(balance, planned(run, self.unit) * num_rounds, limits)
        self._check_budget(balance, spent, limits, f"{num_rounds} rounds")

    def _cost(self, balance: _Balance, mechanisms: Sequence[Mechanism], limits: Limits) -> float:
        """Epsilon with some more mechanisms, never below the epsilon that is booked already.

        Raises:
            LedgerError: the accountant's number is none, or too small.
        """
        composed = epsilon(merged([*balance.mechanisms(), *mechanisms]), limits.delta)
        least = balance.least(limits.delta)
        if math.isnan(composed) or composed < 0.0 or composed < least - _ACCOUNTANT_ERROR:
            raise LedgerError(
                f"{self.path}: the accountant says epsilon {composed:g} at delta {limits.delta:g}, expected at least "
                f"{least:g}, which is booked already"
            )
        return max(composed, least)

    def _check_budget(self, balance: _Balance, spent: float, limits: Limits, asked: str) -> None:
        if balance.has_unclaimed:
            raise BudgetError(
                f"{self.path}: holds rounds with {NO_CLAIM}; no later round on these patients can claim one"
            )
        if not spent <= limits.epsilon:
            now = self._cost(balance, (), limits)
            raise BudgetError(
                f"privacy budget exhausted: {asked} would reach epsilon {spent:.3f} of {limits.epsilon:g} "
                f"at delta {limits.delta:g}, spent {now:.3f}"
            )

    def _opening(self) -> dict[str, Any]:
        return {
            "kind": "opened",
            "ledger": secrets.token_hex(8),
            "site": self.site,
            "accountant": "PRV (Opacus)",
            "randomness": "ChaCha20, keys of the operating system",
            **_OPENING[self.unit],
        }

    def _verified(self, file: IO[bytes]) -> _Balance:
        """The balance of the ledger; the file is read only if anybody but this object has touched it or the anchor."""
        is_anchored = self._chain.anchor is None or self._chain.read_anchor() == self._position.end
        if not (is_anchored and self._position.is_current(file)):
            content, position = self._chain.snapshot(file)
            balance = _Balance()
            for entry in self._checked(content):
                balance.add(entry)
            self._balance, self._position = balance, position
        return self._balance

    def _checked(self, content: bytes) -> list[Entry]:
        entries = self._checked_without_anchor(content)
        self._chain.check_anchor(entries, _REMEDY)
        return entries

    def _checked_without_anchor(self, content: bytes) -> list[Entry]:
        entries = list(self._chain.verified(content))
        for number, entry in enumerate(entries, start=1):
            if entry.get("kind") != ("opened" if number == 1 else "round"):
                raise LedgerError(f"{self.path}: line {number} is no entry of a ledger")
        if entries and entries[0]["site"] != self.site:
            raise LedgerError(
                f"{self.path}: belongs to site {entries[0]['site']}, expected {self.site}; set another ledger-dir"
            )
        if entries and entries[0]["unit"] != self.unit:
            raise LedgerError(f"{self.path}: is kept per {entries[0]['unit']}, expected per {self.unit}")
        self._check_answered(entries)
        return entries

    def _check_answered(self, entries: Sequence[Entry]) -> None:
        try:
            answered = self._answered()
        except DataError as error:
            raise LedgerError(f"{self.path}: cannot be compared with the audit log: {error}") from error
        rounds, booked = max(len(entries) - 1, 0), {entry["epsilon"] for entry in entries[1:]}
        if rounds < answered.count or not (answered.epsilon is None or answered.epsilon in booked):
            spent = "" if answered.epsilon is None else f" and epsilon {answered.epsilon:.3f}"
            raise LedgerError(
                f"{self.path}: holds {rounds} rounds and less than was spent, the audit log tells of "
                f"{answered.count} answered ones{spent}; restore the file from a backup"
            )

    def _append(self, file: BufferedRandom, content: Mapping[str, Any]) -> None:
        """Add an entry to a verified ledger, then to its balance. A line cut short by a crash goes: its round never
        ran."""
        stamped = {**content, "time": datetime.now(UTC).isoformat(timespec="seconds")}
        entry, self._position = self._chain.append(file, self._position, stamped)
        self._balance.add(entry)


def run_ledger(folder: Path) -> Ledger:
    """The ledger of a run's server, in the run folder."""
    return Ledger(folder / "ledger", "server", anchor_dir=folder / "checkpoint", unit="site")


def mechanisms_of(entry: Entry) -> list[Mechanism]:
    """The mechanisms that an entry lists; none for the opening."""
    return [Mechanism(**{**words, "releases": tuple(words["releases"])}) for words in entry.get("mechanisms", ())]


def _sealed(content: Mapping[str, Any], before: str) -> bytes:
    """The line of an entry: its content, the hash of the line before, and the hash of both."""
    stamped = {**content, "before": before}
    digest = hashlib.sha256(json.dumps(stamped, sort_keys=True).encode()).hexdigest()
    return json.dumps({**stamped, "hash": digest}, sort_keys=True).encode() + b"\n"
