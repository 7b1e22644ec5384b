"""The round loop of a federation, from the server's side.

    1. shake hands    every site tells what it holds                                    handshake.py
       inputs         sum what the tokenizers read, if the run lacks its constants      input_constants.py
    2. each round     choose the sites that are asked                                   membership.py, expected_sites.py
                      send each its groups, read replies until the deadline             exchange.py
                      refuse bad replies, average the others, step                      strategies/
                      keep the model only if it is not worse, in a run with a gate      round_gate.py
                      write a line in rounds.jsonl and a checkpoint                     round_line.py, checkpoint.py
                      show it to people                                                 console.py, tracking.py
    3. probe          fit probes of labels on the patients of all sites, if asked for   label_probe.py
    4. save           the final model                                                   run_folder.py

A round with fewer good replies than `federation.min-sites` ends the run with an error; it can be resumed.
"""

import logging
import secrets
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord
from flwr.serverapp import Grid
from torch import Tensor

from panfm.config import RunConfig, dump_toml
from panfm.config.site_dp import SiteDpConfig
from panfm.errors import RunError
from panfm.models import build_model, describe_model
from panfm.models.packing import frozen_manifest, trained_manifest
from panfm.privacy.guarantees import privacy_label
from panfm.privacy.ledger import Limits, run_ledger
from panfm.report.run_events import EventKind
from panfm.sharing.groups import Flat, GroupManifest
from panfm.sharing.messages import Handshake, RoundTask
from server.checkpoint import ServerState
from server.console import Progress
from server.exchange import Exchange, check_sums_fit
from server.handshake import Attendance, shake_hands
from server.input_constants import fill_in_constants
from server.label_probe import LabelProbes, fit_probes
from server.membership import Membership
from server.round_gate import RoundGate
from server.round_line import round_line
from server.run_folder import RunFolder
from server.run_watch import note_budget
from server.tracking import Tracking
from strategies import GroupedMean, SiteDpMean
from strategies.round_messages import make_array, view_arrays

logger = logging.getLogger(__name__)


def run_federation(grid: Grid, folder: RunFolder, progress: Progress, *, num_sites: int | None = None) -> None:
    """Run all rounds that are still to do, and save the model.

    Args:
        grid: Flower's connection to the sites.
        folder: A new run, or one to resume.
        num_sites: Wait for, and require, this many sites; `federation.min-sites` when left out.
    Raises:
        RunError: too few sites, one that does not fit, or a round without enough good replies.
    """
    run = folder.shared_run
    num_sites = needed_sites(run.site_dp, num_sites)
    embedding_size = describe_model(run).embedding_size
    check_sums_fit(run, embedding_size)
    first, manifest = initial_state(run, start := folder.start())
    frozen = folder.frozen() or folder.keep_frozen(frozen_groups(run, start))
    state = folder.latest_state() or first
    folder.events.begin(state.run_id, state.round_number)
    attendance = _gather_sites(grid, folder, manifest, progress, num_sites=num_sites)
    if state is first:
        folder.save_state(state)
    fill_in_constants(grid, folder, state.run_id, attendance.roster)
    run = folder.shared_run
    strategy = make_strategy(folder, manifest, attendance.roster, state, frozen)
    membership = Membership(grid, run, manifest, attendance)
    gate = RoundGate(grid, run, frozen, embedding_size) if run.gate else None
    if gate and state.measure is None:
        folder.save_state(state := gate.start(state, _choose_sites(folder, membership, state.round_number + 1)))
        strategy.memory = state.memory
    costs = PlannedCosts(run, folder.rounds())
    with Tracking(folder, state.run_id) as tracking:
        while state.round_number < run.train.rounds:
            strategy.roster = _choose_sites(folder, membership, state.round_number + 1)
            before = state
            state, line = train_round(grid, strategy, before)
            if gate and len(line["sites"]) >= run.federation.min_sites:
                state, line["gate"] = gate.decide(before, state, strategy.roster)
                strategy.memory = state.memory
            line |= {"away": membership.away(line["round"], line["asked"]), "moved": membership.moved}
            line["epsilon"] = costs.after(line["asked"])
            folder.append_round(line)
            folder.events.note_round(line)
            note_budget(run, line["epsilon"], folder.events)
            tracking.round(line)
            membership.note_late(line)
            for site, reason in line["rejected"].items():
                logger.warning("round %s: %s left out: %s", line["round"], site, reason)
            require_quorum(run.federation.min_sites, line)
            folder.save_state(state)
            progress.round(run.train.rounds, line)
    probes = LabelProbes()
    if run.probe.tasks:
        roster = _choose_sites(folder, membership, state.round_number + 1)
        kept = folder.kept_sums(state.round_number)
        probes = fit_probes(grid, run, state, roster, frozen=frozen, embedding_size=embedding_size, kept=kept)
        progress.probes(probes)
    sites = [handshake.site for handshake in attendance.roster.values()]
    folder.save_model(state, manifest, frozen, sites, probes)
    folder.kept_sums(state.round_number).unlink(missing_ok=True)
    folder.events.note(EventKind.FINISHED, f"the model of round {state.round_number} is saved")


def train_round(grid: Grid, strategy: GroupedMean, state: ServerState) -> tuple[ServerState, dict[str, Any]]:
    """Ask the strategy's sites to train, and aggregate their replies.

    Returns:
        The state after the round, and its line for rounds.jsonl.
    """
    start, number, run = time.monotonic(), state.round_number + 1, strategy.run
    task = RoundTask(state.run_id, number, dump_toml(run), state.groups, state.profile)
    config = ConfigRecord(dict(task.to_records().config))
    arrays = ArrayRecord({group: make_array(flat) for group, flat in state.groups.items()})
    messages = strategy.configure_train(number, arrays, config, grid)
    exchange = Exchange(grid, messages, run.federation.round_timeout_s)
    arrays, _ = strategy.aggregate_train(number, exchange)
    line = round_line(number, time.monotonic() - start, exchange, strategy)
    groups, profile = view_arrays(arrays), line["profile"] or state.profile
    return ServerState(state.run_id, number, groups, profile, strategy.memory), line


def _gather_sites(
    grid: Grid, folder: RunFolder, manifest: GroupManifest, progress: Progress, *, num_sites: int | None
) -> Attendance:
    """Shake hands with the sites that are online. Raises RunError if too few take part or one does not fit."""
    run, expected = folder.shared_run, folder.expected_sites()
    attendance = shake_hands(grid, run, manifest, num_sites=num_sites, expected=expected, on_site=progress.site)
    folder.save_sites(attendance)
    attendance.require(num_sites or run.federation.min_sites)
    progress.absent(attendance.failed)
    progress.privacy(privacy_label(run))
    return attendance


def _choose_sites(folder: RunFolder, membership: Membership, round_number: int) -> dict[int, Handshake]:
    """Return the sites to ask in a round; write sites.json if sites joined or left."""
    roster = membership.attendance.roster
    chosen = membership.gather(round_number)
    if membership.attendance.roster is not roster:
        folder.save_sites(membership.attendance)
    return chosen


def needed_sites(site_dp: SiteDpConfig | None, num_sites: int | None) -> int | None:
    """Number of sites to wait for. Raises RunError if site-level privacy counts on another number than `num_sites`."""
    expected = site_dp.num_sites if site_dp else num_sites
    if num_sites not in (None, expected):
        raise RunError(f"{num_sites} sites, expected {expected} (site-dp.num-sites)")
    return expected


def make_strategy(
    folder: RunFolder,
    manifest: GroupManifest,
    roster: Mapping[int, Handshake],
    state: ServerState,
    frozen: Mapping[str, Flat],
) -> GroupedMean:
    """Create the strategy of a run. Raises BudgetError if site-level privacy does not cover the rounds to come."""
    run = folder.shared_run
    if run.site_dp is None:
        return GroupedMean(run, manifest, roster, state.memory, frozen=frozen)
    if len(roster) != run.site_dp.num_sites:
        raise RunError(f"{len(roster)} sites, expected {run.site_dp.num_sites} (site-dp.num-sites)")
    budget = SiteDpBudget(run, folder.path, state.run_id, [handshake.site for handshake in roster.values()])
    budget.check_ahead(run.train.rounds - state.round_number)
    return SiteDpMean(run, manifest, roster, state.memory, pay=budget.pay, frozen=frozen)


def require_quorum(min_sites: int, line: Mapping[str, Any]) -> None:
    """Raises RunError if a round had too few good replies; the error says why each of the others failed."""
    num_replies = len(line["sites"])
    if num_replies < min_sites:
        reasons = "; ".join(f"{site}: {reason}" for site, reason in line["rejected"].items())
        raise RunError(
            f"round {line['round']}: {num_replies} good replies, at least {min_sites} needed (federation.min-sites): "
            f"{reasons}"
        )


def initial_state(run: RunConfig, start: Mapping[str, Tensor] | None = None) -> tuple[ServerState, GroupManifest]:
    """Return the trained shared parameters before round 1, under a new run id, and the layout of their groups.

    Args:
        start: The shared parameters of a warm start.
    """
    manifest = trained_manifest(describe_model(run), run.sharing)
    groups = manifest.pack_all(_shared(run, start))
    return ServerState(f"{run.name[:48]}-{secrets.token_hex(4)}", 0, groups), manifest


def frozen_groups(run: RunConfig, start: Mapping[str, Tensor] | None = None) -> dict[str, Flat]:
    """Return the shared parameters that the run does not train, packed by group; empty if it trains all.

    Args:
        start: The shared parameters of a warm start.
    """
    manifest = frozen_manifest(describe_model(run), run.sharing)
    return manifest.pack_all(_shared(run, start)) if manifest.groups else {}


def _shared(run: RunConfig, start: Mapping[str, Tensor] | None) -> dict[str, Flat]:
    """The shared parameters before round 1, by name."""
    shared = start or build_model(run).split_state(run.sharing)[0]
    return {name: tensor.detach().numpy() for name, tensor in shared.items()}


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
