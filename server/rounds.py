"""The round loop of a federation, from the server's side.

    1. shake hands    every site tells what it holds                                    handshake.py
       inputs         sum what the tokenizers read, if the run lacks its constants      input_constants.py
    2. each round     choose the sites that are asked                                   membership.py, expected_sites.py
                      send each its groups, read replies until the deadline             round_attempt.py, exchange.py
                      refuse bad replies, average the others, step                      strategies/
                      keep the model only if it is not worse, in a run with a gate      round_gate.py
                      write a line in rounds.jsonl and a checkpoint                     round_line.py, checkpoint.py
                      show it to people                                                 console.py, tracking.py
    3. probe          fit probes of labels on the patients of all sites, if asked for   label_probe.py
    4. save           the final model                                                   run_folder.py

A round with fewer good replies than `federation.min-sites` does not count: it is waited for and asked again
(quorum.py). What cannot heal ends the run with an error; it can be resumed.
"""

import secrets
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from flwr.serverapp import Grid
from torch import Tensor

from panfm.config import RunConfig
from panfm.config.site_dp import SiteDpConfig
from panfm.errors import RunError
from panfm.models import build_model, describe_model
from panfm.models.packing import frozen_manifest, trained_manifest
from panfm.privacy.guarantees import privacy_label
from panfm.report.run_events import EventKind
from panfm.sharing.groups import Flat, GroupManifest
from panfm.sharing.messages import Handshake
from server.checkpoint import ServerState
from server.console import Progress
from server.exchange import Watch, check_sums_fit
from server.handshake import Attendance, shake_hands
from server.input_constants import fill_in_constants
from server.label_probe import LabelProbes, fit_probes
from server.membership import Membership
from server.monitor_faults import note_monitors
from server.progress_file import ProgressFile
from server.quorum import NoQuorumError, QuorumWait
from server.round_attempt import RoundAttempt
from server.round_costs import PlannedCosts, SiteDpBudget
from server.round_gate import RoundGate
from server.run_folder import RunFolder
from server.run_watch import note_budget
from server.tracking import Tracking
from strategies import GroupedMean, SiteDpMean


def run_federation(grid: Grid, folder: RunFolder, progress: Progress, *, num_sites: int | None = None) -> None:
    """Run all rounds that are still to do, and save the model.

    Args:
        grid: Flower's connection to the sites.
        folder: A new run, or one to resume.
        num_sites: Of a simulation, all of which must take part and none of which is waited for; None: real sites, of
            which `federation.min-sites` must.
    Raises:
        RunError: too few sites, a simulated one that does not fit, or a round without enough good replies.
    """
    is_simulated = num_sites is not None
    run = folder.shared_run
    num_sites = needed_sites(run.site_dp, num_sites)
    embedding_size = describe_model(run).embedding_size
    check_sums_fit(run, embedding_size)
    first, manifest = initial_state(run, start := folder.start())
    frozen = folder.frozen() or folder.keep_frozen(frozen_groups(run, start))
    state = folder.latest_state() or first
    folder.events.begin(state.run_id, state.round_number)
    now = ProgressFile(None if is_simulated else folder.path)
    wait = QuorumWait(0.0 if is_simulated else run.federation.wait_for_quorum_s, folder.events, now)
    gather = partial(_gather_sites, grid, folder, manifest, progress, num_sites=num_sites, watch=now.follow)
    attendance = wait.until_quorum("handshake", partial(gather, is_strict=is_simulated))
    if state is first:
        folder.save_state(state)
    at_least = run.federation.min_sites if wait.wait_s else 0
    fill_in = partial(fill_in_constants, grid, folder, state.run_id, attendance.roster)
    wait.until_quorum("input-constants", partial(fill_in, at_least=at_least, watch=now.follow))
    run = folder.shared_run
    strategy = make_strategy(folder, manifest, attendance.roster, state, frozen)
    ping_timeout_s = 0.0 if is_simulated else run.federation.ping_timeout_s
    membership = Membership(grid, run, manifest, attendance, ping_timeout_s=ping_timeout_s)
    choose = partial(_choose_sites, folder, membership, now, at_least=at_least)
    gate = RoundGate(grid, run, frozen, embedding_size, at_least, now.follow) if run.gate else None
    if gate and state.measure is None:
        folder.save_state(state := wait.until_quorum("gate", partial(_start_gate, gate, state, choose)))
        strategy.memory = state.memory
    costs = PlannedCosts(run, folder.rounds())
    with Tracking(folder, state.run_id) as tracking:
        while state.round_number < run.train.rounds:
            attempt = RoundAttempt(grid, strategy, membership, before := state, choose, now.follow)
            try:
                state, line = wait.until_quorum(f"round {before.round_number + 1}", attempt)
            except NoQuorumError as error:
                if error.line:
                    line = {**error.line, "counts": False, "epsilon": costs.after(error.line["asked"])}
                    folder.append_round(line)
                    folder.events.note_round(line)
                raise
            if gate:
                decide = partial(gate.decide, before, state, strategy.roster)
                state, line["gate"] = wait.until_quorum(f"gate after round {state.round_number}", decide)
                strategy.memory = state.memory
            _note_round(folder, tracking, costs, line)
            folder.save_state(state)
            progress.round(run.train.rounds, line)
    probes = LabelProbes()
    if run.probe.tasks:
        fit = partial(fit_probes, grid, run, state, frozen=frozen, embedding_size=embedding_size, watch=now.follow)
        fit = partial(fit, kept=folder.kept_sums(state.round_number), at_least=at_least)
        probes = wait.until_quorum("probe", lambda: fit(choose(state.round_number + 1)))
        progress.probes(probes)
    sites = [handshake.site for handshake in attendance.roster.values()]
    folder.save_model(state, manifest, frozen, sites, probes)
    folder.kept_sums(state.round_number).unlink(missing_ok=True)
    folder.events.note(EventKind.FINISHED, f"the model of round {state.round_number} is saved")


def _note_round(folder: RunFolder, tracking: Tracking, costs: PlannedCosts, line: dict[str, Any]) -> None:
    """Write down and show a round that is done."""
    line["epsilon"] = costs.after(line["asked"])
    folder.append_round(line)
    folder.events.note_round(line)
    note_monitors(line, folder.events)
    note_budget(folder.shared_run, line["epsilon"], folder.events)
    tracking.round(line)


def _gather_sites(
    grid: Grid,
    folder: RunFolder,
    manifest: GroupManifest,
    progress: Progress,
    *,
    num_sites: int | None,
    is_strict: bool,
    watch: Watch,
) -> Attendance:
    """Shake hands with the sites that are online.

    Args:
        is_strict: A site that does not fit ends the run; otherwise it is left out.
    Raises:
        RunError: one does not fit.
        NoQuorumError: too few take part.
    """
    run, expected = folder.shared_run, folder.expected_sites()
    attendance = shake_hands(grid, run, manifest, num_sites=num_sites, expected=expected, watch=watch)
    if not is_strict:
        attendance.leave_out_misfits()
    folder.save_sites(attendance)
    attendance.require(num_sites or run.federation.min_sites)
    for handshake in attendance.roster.values():
        progress.site(handshake)
    progress.absent(attendance.failed)
    progress.privacy(privacy_label(run))
    return attendance


def _start_gate(gate: RoundGate, state: ServerState, choose: Callable[[int], Mapping[int, Handshake]]) -> ServerState:
    """Measure the model that the run starts from."""
    return gate.start(state, choose(state.round_number + 1))


def _choose_sites(
    folder: RunFolder, membership: Membership, now: ProgressFile, round_number: int, *, at_least: int
) -> dict[int, Handshake]:
    """Return the sites to ask in a round; write sites.json if sites joined or left.

    Raises:
        NoQuorumError: they are fewer than `at_least`.
    """
    roster = membership.attendance.roster
    chosen = membership.gather(round_number)
    if membership.attendance.roster is not roster:
        folder.save_sites(membership.attendance)
    away = membership.away(round_number, {handshake.site for handshake in chosen.values()})
    now.leave_out(away)
    if len(chosen) < at_least:
        reasons = "; ".join(f"{site}: {reason}" for site, reason in away.items()) or "no other has joined"
        text = f"before round {round_number}: {len(chosen)} of at least {at_least} sites there (federation.min-sites)"
        raise NoQuorumError(f"{text}: {reasons}", can_heal=True)
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
