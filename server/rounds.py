"""The federation, from the server's side: shake hands, then rounds, then the final model.

    1. every site tells what it holds                                  (handshake.py)
    2. each round: see who is there, send each site its groups, take replies until the deadline, refuse bad ones,
       average the rest                                                (roster.py, exchange.py, strategies/)
    3. each round ends on disk: a checkpoint and a line in rounds.jsonl (checkpoint.py, run_folder.py), and what
       people look at meanwhile                                        (tracking.py)

A round with fewer good replies than `federation.min-sites` ends the run with an error; it can be resumed.
"""

import logging
import secrets
import time
from collections.abc import Mapping
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord
from flwr.serverapp import Grid
from torch import Tensor

from panfm.config import RunConfig, dump_toml
from panfm.errors import RunError
from panfm.models import build_model
from panfm.privacy.guarantees import privacy_label
from panfm.sharing.groups import BACKBONE, GroupManifest, split_state, stream_of
from panfm.sharing.messages import Handshake, RoundReply, RoundTask
from panfm.sharing.profile import federated_profile
from panfm.sharing.shares import capped_shares
from server.checkpoint import ServerState
from server.costs import PlannedCosts
from server.exchange import Exchange
from server.handshake import shake_hands
from server.progress import Progress
from server.roster import Roster
from server.run_folder import RunFolder
from server.site_privacy import Account
from server.tracking import Tracking
from strategies import GroupedMean, RoundOutcome, SitePrivateMean
from strategies.records import make_array, view_array

logger = logging.getLogger(__name__)


def run_federation(grid: Grid, folder: RunFolder, progress: Progress, *, num_sites: int | None = None) -> None:
    """Run all rounds that are still to do.

    Args:
        grid: Flower's line to the sites.
        folder: A new run, or one to resume.
        num_sites: Wait for, and insist on, this many sites; `federation.min-sites` when left out.
    Raises:
        RunError: too few sites, one that does not fit, or a round without a quorum.
    """
    run = folder.shared_run
    num_sites = needed_sites(run, num_sites)
    first, manifest = initial_state(run, folder.start())
    expected = folder.expected_sites()
    attendance = shake_hands(grid, run, manifest, num_sites=num_sites, expected=expected, on_site=progress.site)
    folder.save_sites(attendance)
    attendance.require(num_sites or run.federation.min_sites)
    progress.absent(attendance.failed)
    progress.privacy(privacy_label(run))
    if not (state := folder.latest_state()):
        folder.save_state(state := first)
    strategy = make_strategy(folder, manifest, attendance.roster, state)
    roster, costs = Roster(grid, run, manifest, attendance), PlannedCosts(run, folder.rounds())
    with Tracking(folder) as tracking:
        while state.round_number < run.train.rounds:
            known = attendance.roster
            strategy.roster = roster.gather(state.round_number + 1)
            if attendance.roster is not known:
                folder.save_sites(attendance)
            state, line = train_round(grid, strategy, run, state)
            line |= {"away": roster.away(line["round"], line["asked"]), "moved": roster.moved}
            line["epsilon"] = costs.after(line["asked"])
            folder.append_round(line)
            tracking.round(line)
            roster.note(line)
            _log_rejected(line)
            require_quorum(run, line)
            folder.save_state(state)
            progress.round(run, line)
    folder.save_model(state, manifest, [handshake.site for handshake in attendance.roster.values()])


def needed_sites(run: RunConfig, num_sites: int | None) -> int | None:
    """How many sites to wait for. Raises RunError if site-level privacy counts on another number than there are."""
    expected = run.server_privacy.num_sites if run.server_privacy else num_sites
    if num_sites not in (None, expected):
        raise RunError(f"{num_sites} sites, expected {expected} (server-privacy.num-sites)")
    return expected


def make_strategy(
    folder: RunFolder, manifest: GroupManifest, roster: Mapping[int, Handshake], state: ServerState
) -> GroupedMean:
    """The strategy that a run asks for. Raises BudgetError if site-level privacy does not cover the rounds to come."""
    run = folder.shared_run
    if run.server_privacy is None:
        return GroupedMean(run, manifest, roster, state.memory)
    if len(roster) != run.server_privacy.num_sites:
        raise RunError(f"{len(roster)} sites, expected {run.server_privacy.num_sites} (server-privacy.num-sites)")
    account = Account(run, folder.path, state.run_id, [handshake.site for handshake in roster.values()])
    account.check_ahead(run.train.rounds - state.round_number)
    return SitePrivateMean(run, manifest, roster, state.memory, pay=account.pay)


def train_round(
    grid: Grid, strategy: GroupedMean, run: RunConfig, state: ServerState
) -> tuple[ServerState, dict[str, Any]]:
    """One round: the next state, and its line for rounds.jsonl."""
    start = time.monotonic()
    number = state.round_number + 1
    task = RoundTask(state.run_id, number, dump_toml(run), state.groups, state.profile)
    arrays = ArrayRecord({group: make_array(flat) for group, flat in state.groups.items()})
    config = ConfigRecord(dict(task.to_records().config))
    exchange = Exchange(grid, strategy.configure_train(number, arrays, config, grid), run.federation.round_timeout_s)
    arrays, _ = strategy.aggregate_train(number, exchange)
    line = _round_line(number, start, exchange, strategy)
    line["privacy"] = privacy_label(run)
    groups = {group: view_array(array) for group, array in arrays.items()}
    return ServerState(state.run_id, number, groups, line["profile"] or state.profile, strategy.memory), line


def require_quorum(run: RunConfig, line: Mapping[str, Any]) -> None:
    """Raises RunError if a round had too few good replies; the line says why each of the others failed."""
    needed, found = run.federation.min_sites, len(line["sites"])
    if found < needed:
        reasons = "; ".join(f"{site}: {reason}" for site, reason in line["rejected"].items())
        raise RunError(
            f"round {line['round']}: {found} good replies, at least {needed} needed (federation.min-sites): {reasons}"
        )


def _log_rejected(line: Mapping[str, Any]) -> None:
    for site, reason in line["rejected"].items():
        logger.warning("round %s: %s left out: %s", line["round"], site, reason)


def initial_state(run: RunConfig, start: Mapping[str, Tensor] | None = None) -> tuple[ServerState, GroupManifest]:
    """What is shared of the model before round 1, under a new run id, and the layout of its groups.

    Args:
        start: The shared parameters of a warm start.
    """
    shared = start or split_state(run.sharing, build_model(run).state_dict())[0]
    tensors = {name: tensor.numpy() for name, tensor in shared.items()}
    manifest = GroupManifest.of({name: tensor.shape for name, tensor in tensors.items()})
    return ServerState(f"{run.name[:48]}-{secrets.token_hex(4)}", 0, manifest.pack_all(tensors)), manifest


def _round_line(
    number: int,
    start: float,
    exchange: Exchange,
    strategy: GroupedMean,
) -> dict[str, Any]:
    """What happened in a round, by site name."""
    names = {node_id: handshake.site for node_id, handshake in strategy.asked.items()}
    outcome = strategy.outcome
    seconds = {names[node_id]: value for node_id, value in exchange.seconds.items()}
    failed = {
        names[node_id]: reason.removeprefix(f"site {names[node_id]}: ") for node_id, reason in exchange.failed.items()
    }
    accepted = dict(sorted(outcome.accepted.items()))
    return {
        "round": number,
        "asked": sorted(names.values()),
        "phase": "train",
        "seconds": round(time.monotonic() - start, 4),
        "loss": _mean_loss(accepted, strategy.run.federation.max_share),
        "sites": {site: _site_line(site, reply, outcome, seconds[site]) for site, reply in accepted.items()},
        "late": sorted(names[node_id] for node_id in exchange.late),
        "rejected": dict(sorted((failed | outcome.rejected).items())),
        "coverage": _coverage(accepted),
        "bytes_down": dict(strategy.bytes_down),
        "bytes_up": dict(sorted(outcome.bytes_up.items())),
        "profile": federated_profile(accepted.values(), strategy.run.federation.max_share),
    }


def _coverage(replies: Mapping[str, RoundReply]) -> dict[str, list[str]]:
    """Stream -> sites whose replies moved it."""
    found: dict[str, list[str]] = {}
    for site, reply in replies.items():
        for group in reply.weights:
            if (stream := stream_of(group)) and any(reply.weights[group]):
                found.setdefault(stream, []).append(site)
    return dict(sorted(found.items()))


def _site_line(site: str, reply: RoundReply, outcome: RoundOutcome, seconds: float) -> dict[str, Any]:
    return {
        "seconds": round(seconds, 4),
        "state_round": reply.state_round,
        "loss": reply.loss,
        "validation_loss": reply.validation_loss,
        "num_skipped": reply.num_skipped,
        "saliency": dict(reply.saliency),
        "weights": dict(reply.weights),
        "shares": {group: round(share, 6) for group, share in outcome.shares[site].items()},
        "norms": {group: float(f"{norm:.4g}") for group, norm in outcome.norms[site].items()},
    }


def _mean_loss(replies: Mapping[str, RoundReply], max_share: float) -> float | None:
    """Mean of the losses that were released, weighted as the backbone is, and capped as it is."""
    known = {site: reply.loss for site, reply in replies.items() if reply.loss is not None}
    shares = capped_shares({site: sum(replies[site].weights[BACKBONE]) for site in known}, max_share)
    return sum(loss * shares[site] for site, loss in known.items()) if any(shares.values()) else None
