"""What a site has spent: one append-only file, shared by all runs on its patients. (A server that adds noise for its
sites keeps one per run.)

    <ledger-dir>/ledger.jsonl     one line per entry: the first opens the ledger, every other is one private round

Every line holds the SHA-256 of the line before, so that no entry can be changed, moved or removed without a trace; the
anchor, kept with the private state, remembers the newest line, so that cutting the end off leaves one too. A ledger
without its anchor is refused, and so is an anchor without its ledger. Who can write both files can cut both: the record
of what left the site still tells what was spent, and a ledger that holds less is refused. An end of the chain that was
noted elsewhere finds who cut all three (`panfm ledger verify --noted`). A round is written and synced to disk *before*
it runs: a crash counts too much, never too little.

A process verifies the whole file when it first reads it, and again whenever somebody else has touched it; its own
entries it adds to what it has verified, so that a round costs the same however long the ledger is.
"""

import fcntl
import hashlib
import json
import math
import os
import secrets
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from io import BufferedRandom
from pathlib import Path
from typing import IO, Any

from panfm.config import RunConfig
from panfm.errors import BudgetError, DataError, LedgerError
from panfm.files import FileStamp, write_atomic
from panfm.privacy.guarantees import NO_CLAIM, claim, server_claim
from panfm.privacy.mechanisms import LEAST_NOISE, Mechanism, Unit, check_mechanism, epsilon, merged, planned

FILE = "ledger.jsonl"
ANCHOR = "ledger.anchor"
_FIRST = "0" * 64
_ACCOUNTANT_ERROR = 0.02
"""How far two of the accountant's upper bounds of one number may lie apart."""
_OPENING = {
    "patient": {"unit": "patient", "relation": "add-or-remove-one", "sampling": "Poisson, secret"},
    "site": {"unit": "site", "relation": "zero-out", "sampling": "none: all sites in every round"},
}
Entry = Mapping[str, Any]


@dataclass
class Permit:
    """Leave to run one round's mechanisms, once. Only `Ledger.spend` makes one."""

    run_id: str
    round_number: int
    mechanisms: tuple[Mechanism, ...]
    claim: str
    """What the round may say of itself."""
    _is_used: bool = field(default=False, repr=False)

    def use(self) -> None:
        """Raises LedgerError the second time."""
        if self._is_used:
            raise LedgerError(f"permit: round {self.round_number} of {self.run_id} ran already, expected a new permit")
        self._is_used = True


@dataclass(frozen=True)
class Departed:
    """What the record of messages that left a site tells of its private rounds."""

    rounds: int = 0
    """Answered ones; a round that was paid for and not answered is none."""
    epsilon: float | None = None
    """What the ledger said when a message of a private run left last."""


@dataclass(frozen=True)
class Limits:
    """The most that may be spent: the smaller of what the run asks and what the site allows."""

    epsilon: float
    delta: float

    def __post_init__(self) -> None:
        if not (self.epsilon > 0.0 and 0.0 < self.delta < 1.0):
            raise LedgerError(
                f"limits: epsilon {self.epsilon:g} and delta {self.delta:g}, expected epsilon > 0 and delta in (0, 1)"
            )


@dataclass
class _Balance:
    """What the entries of a verified ledger add up to."""

    size: int = 0
    """Bytes of all whole lines."""
    end: str = _FIRST
    """Hash of the newest entry."""
    counts: Counter[Mechanism] = field(default_factory=Counter)
    """How often each mechanism, of count 1, was applied."""
    greatest: dict[float, float] = field(default_factory=dict)
    """Delta -> largest epsilon that was booked at it."""
    newest: float | None = None
    """Epsilon after the newest round."""
    has_unclaimed: bool = False
    """Whether a round ran although something broke its guarantee."""

    def add(self, entry: Entry) -> None:
        """Take the next entry in."""
        self.size += len(_line(entry))
        self.end = entry["hash"]
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
        """The least that a further entry at this delta can amount to: epsilon grows with every round, and with a
        smaller delta."""
        return max((spent for at, spent in self.greatest.items() if at >= delta), default=0.0)


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
        departed: Callable[[], Departed] = Departed,
    ) -> None:
        """A ledger that is there, or that the first `spend` opens.

        Args:
            folder: Where the file lies; all runs on these patients share it.
            site: Public name of the site, or "server".
            anchor_dir: Where the newest line is remembered; not at all when left out.
            unit: Whom it is kept for: a site's patients, or a server's sites.
            departed: Tells what the record of messages that left holds; asked whenever the whole file is read.
        """
        self.path = folder / FILE
        self.site = site
        self.unit: Unit = unit
        self._anchor = anchor_dir / ANCHOR if anchor_dir else None
        self._departed = departed
        self._balance = _Balance()
        self._stamp: FileStamp | None = None
        """Of the file that the balance was verified on."""

    def spend(self, run: RunConfig, run_id: str, round_number: int, *, limits: Limits, dataset: str) -> Permit:
        """Write a round down, if the budget covers it.

        Args:
            run: The run's description.
            limits: Of the run and the site together.
            dataset: Fingerprint of the patients, or names of the sites.
        Raises:
            ProtocolError: a mechanism of the run cannot be accounted for, or has too little noise for its claim.
            BudgetError: with this round more than `limits` would be spent; nothing is written.
            LedgerError: the file or its anchor is missing, another site's, or does not hold.
        """
        mechanisms = planned(run, self.unit)
        promise = claim(run) if self.unit == "patient" else server_claim(run)
        assert promise is not None
        acknowledged = self.unit == "patient" and run.privacy and run.privacy.acknowledge_broken_guarantee
        for mechanism in mechanisms:
            check_mechanism(mechanism, least_noise=0.0 if acknowledged else LEAST_NOISE)
        with self._locked() as file:
            balance = self._verified(file)
            spent = self._cost(balance, mechanisms, limits)
            if promise != NO_CLAIM:
                self._check_budget(balance, spent, limits, f"round {round_number}")
            if balance.end == _FIRST:
                self._append(file, self._opening())
            entry = {
                "kind": "round",
                "run": run_id,
                "round": round_number,
                "mechanisms": [asdict(each) for each in mechanisms],
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
        with self._opened() as file:
            return self._read(file)

    def spent(self) -> float | None:
        """Epsilon after the newest round, None before the first. Raises LedgerError as `entries` does."""
        with self._opened() as file:
            return self._verified(file).newest

    def check_noted(self, noted: str) -> bool:
        """Check that an end of the chain, which somebody noted earlier, is still in the ledger, and that the ledger
        holds what the record of messages that left says was spent. If there is no anchor it is then written anew: that
        somebody vouches for the entries up to the noted one, and the record for those behind it.

        Returns:
            Whether the anchor was written.
        Raises:
            LedgerError: the end is not in the ledger, the record says that more was spent, or the file does not hold.
        """
        with self._opened() as file:
            is_anchored = self._anchor is None or self._anchor.exists()
            entries = self._read(file) if is_anchored else self._read_unanchored(file)
            if noted not in {entry["hash"] for entry in entries}:
                raise LedgerError(f"{self.path}: the end noted is not in it, entries were cut off or written anew")
            if self._anchor and not is_anchored:
                write_atomic(self._anchor, str(entries[-1]["hash"]).encode())
            return not is_anchored

    def check_ahead(self, run: RunConfig, num_rounds: int, *, limits: Limits) -> None:
        """Raises BudgetError if so many more rounds do not fit; writes nothing."""
        with self._opened() as file:
            balance = self._verified(file)
        spent = self._cost(balance, planned(run, self.unit) * num_rounds, limits)
        self._check_budget(balance, spent, limits, f"{num_rounds} rounds")

    def _cost(self, balance: _Balance, mechanisms: Sequence[Mechanism], limits: Limits) -> float:
        """Epsilon with some more mechanisms, never below what is booked already.

        Raises:
            LedgerError: what the accountant says cannot be.
        """
        told = epsilon(merged([*balance.mechanisms(), *mechanisms]), limits.delta)
        least = balance.least(limits.delta)
        if math.isnan(told) or told < 0.0 or told < least - _ACCOUNTANT_ERROR:
            raise LedgerError(
                f"{self.path}: the accountant says epsilon {told:g} at delta {limits.delta:g}, expected at least "
                f"{least:g}, which is booked already"
            )
        return max(told, least)

    def _check_budget(self, balance: _Balance, spent: float, limits: Limits, what: str) -> None:
        if balance.has_unclaimed:
            raise BudgetError(
                f"{self.path}: holds rounds with {NO_CLAIM}; no later round on these patients can claim one"
            )
        if not spent <= limits.epsilon:
            now = self._cost(balance, (), limits)
            raise BudgetError(
                f"privacy budget exhausted: {what} would reach epsilon {spent:.3f} of {limits.epsilon:g} "
                f"at delta {limits.delta:g}, spent {now:.3f}"
            )

    def _opening(self) -> dict[str, Any]:
        return {
            "kind": "opened",
            "ledger": secrets.token_hex(8),
            "site": self.site,
            "accountant": "PRV (Opacus)",
            "randomness": "operating system",
            **_OPENING[self.unit],
        }

    @contextmanager
    def _locked(self) -> Iterator[BufferedRandom]:
        """The file, open for reading and appending, while no other process has it."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            file = self.path.open("a+b")
        except OSError as error:
            raise LedgerError(f"{self.path}: cannot be opened ({error.strerror}), expected a writable file") from error
        with file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield file

    @contextmanager
    def _opened(self) -> Iterator[IO[bytes]]:
        """The file, open for reading while no other process writes it; an empty one if there is none."""
        with _open_or_empty(self.path) as file:
            fcntl.flock(file, fcntl.LOCK_SH)
            yield file

    def _verified(self, file: IO[bytes]) -> _Balance:
        """The balance of the ledger; the file is read only if anybody but this object has touched it or the anchor."""
        stamp = FileStamp.of(file)
        is_anchored = self._anchor is None or self._remembered() == self._balance.end
        if stamp != self._stamp or not is_anchored:
            balance = _Balance()
            for entry in self._read(file):
                balance.add(entry)
            self._balance, self._stamp = balance, stamp
        return self._balance

    def _read(self, file: IO[bytes]) -> list[Entry]:
        entries = self._read_unanchored(file)
        self._check_anchor(entries)
        return entries

    def _read_unanchored(self, file: IO[bytes]) -> list[Entry]:
        file.seek(0)
        entries = check_chain(file.read(), str(self.path))
        if entries and entries[0]["site"] != self.site:
            raise LedgerError(
                f"{self.path}: belongs to site {entries[0]['site']}, expected {self.site}; set another ledger-dir"
            )
        if entries and entries[0]["unit"] != self.unit:
            raise LedgerError(f"{self.path}: is kept per {entries[0]['unit']}, expected per {self.unit}")
        self._check_departed(entries)
        return entries

    def _check_departed(self, entries: Sequence[Entry]) -> None:
        try:
            departed = self._departed()
        except DataError as error:
            raise LedgerError(f"{self.path}: cannot be held against the record of what left: {error}") from error
        rounds, booked = max(len(entries) - 1, 0), {entry["epsilon"] for entry in entries[1:]}
        if rounds < departed.rounds or not (departed.epsilon is None or departed.epsilon in booked):
            spent = "" if departed.epsilon is None else f" and epsilon {departed.epsilon:.3f}"
            raise LedgerError(
                f"{self.path}: holds {rounds} rounds and less than was spent, the record of what left tells of "
                f"{departed.rounds} answered ones{spent}; restore the file from a backup"
            )

    def _check_anchor(self, entries: Sequence[Entry]) -> None:
        if self._anchor is None:
            return
        newest = self._remembered()
        if newest is None and len(entries) > 1:
            raise LedgerError(
                f"{self.path}: its anchor {self._anchor} is missing, so that nobody can tell whether its end was cut "
                "off; restore the anchor, or vouch for the ledger: panfm ledger verify FOLDER --noted END"
            )
        if newest is not None and newest not in {entry["hash"] for entry in entries}:
            raise LedgerError(
                f"{self.path}: missing, foreign or cut off: the newest entry that this site remembers is not in it; "
                "restore the file from a backup"
            )

    def _remembered(self) -> str | None:
        """The hash in the anchor; None if there is no anchor."""
        try:
            return self._anchor.read_bytes().decode("ascii", "replace") if self._anchor else None
        except FileNotFoundError:
            return None
        except OSError as error:
            raise LedgerError(f"{self._anchor}: cannot be read ({error.strerror})") from error

    def _append(self, file: BufferedRandom, content: Mapping[str, Any]) -> None:
        """Add an entry to a verified ledger, then to its balance."""
        stamped = {
            **content,
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "before": self._balance.end,
        }
        entry = {**stamped, "hash": _digest(stamped)}
        file.truncate(self._balance.size)  # a line cut short by a crash: its round never ran
        file.write(_line(entry))
        file.flush()
        os.fsync(file.fileno())
        if self._anchor:
            write_atomic(self._anchor, entry["hash"].encode())
        self._balance.add(entry)
        self._stamp = FileStamp.of(file)


def run_ledger(folder: Path) -> Ledger:
    """The ledger of a run's server, in the run folder."""
    return Ledger(folder / "ledger", "server", anchor_dir=folder / "checkpoint", unit="site")


def check_chain(content: bytes, where: str) -> list[Entry]:
    """The entries of a ledger file. A last line without its end was never followed by a round, and is left out.

    Raises:
        LedgerError: a line was changed, moved, removed or is no entry.
    """
    entries: list[Entry] = []
    before = _FIRST
    for number, line in enumerate(content.split(b"\n")[:-1], start=1):
        try:
            entry = json.loads(line)
            stamped = {key: value for key, value in entry.items() if key != "hash"}
            holds = entry["hash"] == _digest(stamped) and entry["before"] == before and _line(entry) == line + b"\n"
            holds = holds and entry["kind"] == ("round" if entries else "opened")
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise LedgerError(f"{where}: line {number} is no entry of a ledger") from error
        if not holds:
            raise LedgerError(f"{where}: line {number} was changed, moved, or follows a line that was removed")
        before = entry["hash"]
        entries.append(entry)
    return entries


def _open_or_empty(path: Path) -> IO[bytes]:
    try:
        return path.open("rb")
    except FileNotFoundError:
        return Path(os.devnull).open("rb")
    except OSError as error:
        raise LedgerError(f"{path}: cannot be read ({error.strerror})") from error


def mechanisms_of(entry: Entry) -> list[Mechanism]:
    """The mechanisms that an entry lists; none for the opening."""
    return [Mechanism(**{**each, "releases": tuple(each["releases"])}) for each in entry.get("mechanisms", ())]


def _line(entry: Entry) -> bytes:
    return json.dumps(entry, sort_keys=True).encode() + b"\n"


def _digest(entry: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(entry, sort_keys=True).encode()).hexdigest()
