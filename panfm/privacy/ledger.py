"""What a site has spent: one append-only file, shared by all runs on its patients. (A server that adds noise for its
sites keeps one per run.)

    <ledger-dir>/ledger.jsonl     one line per entry: the first opens the ledger, every other is one private round

Every line holds the SHA-256 of the line before, so that no entry can be changed, moved or removed without a trace; the
anchor, kept with the private state, remembers the newest line, so that cutting the end off leaves one too. A round is
written and synced to disk *before* it runs: a crash counts too much, never too little.
"""

import fcntl
import hashlib
import json
import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from io import BufferedRandom, BytesIO
from pathlib import Path
from typing import IO, Any

from panfm.config import RunConfig
from panfm.config.privacy import NO_CLAIM, claim
from panfm.config.server_privacy import server_claim
from panfm.errors import BudgetError, LedgerError
from panfm.files import write_atomic
from panfm.privacy.mechanisms import Mechanism, Unit, epsilon, planned

FILE = "ledger.jsonl"
ANCHOR = "ledger.anchor"
_FIRST = "0" * 64
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
class Limits:
    """The most that may be spent: the smaller of what the run asks and what the site allows."""

    epsilon: float
    delta: float


class Ledger:
    """The ledger of one site and its data set, or of a run's server.

    Guarantees:
        append-only: an entry that was changed, moved or removed is found before anything more is spent.
        spent first: `spend` returns after the entry is on disk, and mechanisms run after `spend`.
        bounded: no entry is written with which the limits would be exceeded.
    """

    def __init__(self, folder: Path, site: str, *, anchor_dir: Path | None = None, unit: Unit = "patient") -> None:
        """A ledger that is there, or that the first `spend` opens.

        Args:
            folder: Where the file lies; all runs on these patients share it.
            site: Public name of the site, or "server".
            anchor_dir: Where the newest line is remembered; not at all when left out.
            unit: Whom it is kept for: a site's patients, or a server's sites.
        """
        self.path = folder / FILE
        self.site = site
        self.unit: Unit = unit
        self._anchor = anchor_dir / ANCHOR if anchor_dir else None

    def spend(self, run: RunConfig, run_id: str, round_number: int, *, limits: Limits, dataset: str) -> Permit:
        """Write a round down, if the budget covers it.

        Args:
            run: The run's description.
            limits: Of the run and the site together.
            dataset: Fingerprint of the patients, or names of the sites.
        Raises:
            BudgetError: with this round more than `limits` would be spent; nothing is written.
            LedgerError: the file is missing, another site's, or does not hold.
        """
        mechanisms = planned(run, self.unit)
        promise = claim(run) if self.unit == "patient" else server_claim(run)
        assert promise is not None
        with self._locked() as file:
            entries = self._read(file)
            before = [each for entry in entries for each in mechanisms_of(entry)]
            spent = epsilon([*before, *mechanisms], limits.delta)
            if promise != NO_CLAIM:
                self._check_budget(entries, before, spent, limits, f"round {round_number}")
            opening = [] if entries else [self._opening()]
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
            self._append(file, entries, [*opening, entry])
        return Permit(run_id, round_number, mechanisms, promise)

    def entries(self) -> list[Entry]:
        """All entries, checked; none if there is no ledger yet. Writes nothing, so whoever may read it may ask.

        Raises:
            LedgerError: the file does not hold, or cannot be read.
        """
        try:
            with self.path.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_SH)
                return self._read(file)
        except FileNotFoundError:
            return self._read(BytesIO())
        except OSError as error:
            raise LedgerError(f"{self.path}: cannot be read ({error.strerror})") from error

    def check_ahead(self, run: RunConfig, num_rounds: int, *, limits: Limits) -> None:
        """Raises BudgetError if so many more rounds do not fit; writes nothing."""
        entries = self.entries()
        before = [each for entry in entries for each in mechanisms_of(entry)]
        spent = epsilon([*before, *planned(run, self.unit) * num_rounds], limits.delta)
        self._check_budget(entries, before, spent, limits, f"{num_rounds} rounds")

    def _check_budget(
        self, entries: Sequence[Entry], before: Sequence[Mechanism], spent: float, limits: Limits, what: str
    ) -> None:
        if any(entry.get("claim") == NO_CLAIM for entry in entries):
            raise BudgetError(
                f"{self.path}: holds rounds with {NO_CLAIM}; no later round on these patients can claim one"
            )
        if not spent <= limits.epsilon:
            now = epsilon(before, limits.delta)
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

    def _read(self, file: IO[bytes]) -> list[Entry]:
        file.seek(0)
        entries = check_chain(file.read(), str(self.path))
        if entries and entries[0]["site"] != self.site:
            raise LedgerError(
                f"{self.path}: belongs to site {entries[0]['site']}, expected {self.site}; set another ledger-dir"
            )
        if entries and entries[0]["unit"] != self.unit:
            raise LedgerError(f"{self.path}: is kept per {entries[0]['unit']}, expected per {self.unit}")
        self._check_anchor(entries)
        return entries

    def _check_anchor(self, entries: Sequence[Entry]) -> None:
        if self._anchor is None or not self._anchor.exists():
            return
        newest = self._anchor.read_bytes().decode("ascii", "replace")
        if newest not in {entry["hash"] for entry in entries}:
            raise LedgerError(
                f"{self.path}: missing, foreign or cut off: the newest entry that this site remembers is not in it; "
                "restore the file from a backup"
            )

    def _append(self, file: BufferedRandom, entries: Sequence[Entry], new: Sequence[Mapping[str, Any]]) -> None:
        before = entries[-1]["hash"] if entries else _FIRST
        file.truncate(sum(len(_line(entry)) for entry in entries))  # a line cut short by a crash: its round never ran
        for content in new:
            stamped = {**content, "time": datetime.now(UTC).isoformat(timespec="seconds"), "before": before}
            before = _digest(stamped)
            file.write(_line({**stamped, "hash": before}))
        file.flush()
        os.fsync(file.fileno())
        if self._anchor:
            write_atomic(self._anchor, before.encode())


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


def mechanisms_of(entry: Entry) -> list[Mechanism]:
    """The mechanisms that an entry lists; none for the opening."""
    return [Mechanism(**{**each, "releases": tuple(each["releases"])}) for each in entry.get("mechanisms", ())]


def _line(entry: Entry) -> bytes:
    return json.dumps(entry, sort_keys=True).encode() + b"\n"


def _digest(entry: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(entry, sort_keys=True).encode()).hexdigest()
