"""The line of a round in rounds.jsonl: sites asked, their replies, refusals with reasons, and means over sites."""

from collections.abc import Iterable, Mapping
from typing import Any

from panfm.privacy.guarantees import privacy_label
from panfm.sharing.groups import BACKBONE, HEAD, stream_group, stream_of
from panfm.sharing.messages import RoundReply
from server.exchange import Exchange
from server.monitor_faults import faults, site_monitors
from strategies import GroupedMean, RoundOutcome
from strategies.weight_caps import capped_shares, capped_weights


def round_line(number: int, seconds: float, exchange: Exchange, strategy: GroupedMean) -> dict[str, Any]:
    """Describe a round, by site name.

    Args:
        number: Of the round.
        seconds: From its start to the new global parameters.
        exchange: Its messages, after the last reply.
        strategy: After it has aggregated the replies.
    """
    names = {node_id: handshake.site for node_id, handshake in strategy.asked.items()}
    outcome, max_share = strategy.outcome, strategy.run.federation.max_share
    waited = {names[node_id]: value for node_id, value in exchange.seconds.items()}
    failed = {
        names[node_id]: reason.removeprefix(f"site {names[node_id]}: ") for node_id, reason in exchange.failed.items()
    }
    accepted = dict(sorted(outcome.accepted.items()))
    return {
        "round": number,
        "asked": sorted(names.values()),
        "phase": "train",
        "seconds": round(seconds, 4),
        "loss": mean_loss(accepted, max_share),
        "sites": {
            site: _site_line(site, reply, outcome, waited[site], strategy.site_bytes_down.get(site, 0))
            for site, reply in accepted.items()
        },
        "late": sorted(names[node_id] for node_id in exchange.late),
        "worker_lost": sorted(names[node_id] for node_id in exchange.worker_lost),
        "rejected": dict(sorted((failed | outcome.rejected).items())),
        "coverage": _coverage(accepted),
        "bytes_down": dict(strategy.bytes_down),
        "bytes_up": dict(sorted(outcome.bytes_up.items())),
        "profile": federated_profile(accepted.values(), max_share),
        "privacy": privacy_label(strategy.run),
        "faults": faults(strategy.run, number, accepted),
    }


def mean_loss(replies: Mapping[str, RoundReply], max_share: float) -> float | None:
    """Mean of the losses that sites released, weighted and capped as the backbone is (the head, where a run trains that
    alone); None if no site did."""
    losses = {site: reply.loss for site, reply in replies.items() if reply.loss is not None}
    group = BACKBONE if all(BACKBONE in replies[site].weights for site in losses) else HEAD
    shares = capped_shares({site: sum(replies[site].weights[group]) for site in losses}, max_share)
    return sum(loss * shares[site] for site, loss in losses.items()) if any(shares.values()) else None


def federated_profile(replies: Iterable[RoundReply], max_share: float = 1.0) -> dict[str, float] | None:
    """Mean saliency per stream over all sites, weighted and capped as the stream's parameters are.

    Saliency tells how much the model leans on a stream, relative to an equal split (1: the stream's fair share). Sites
    with one stream are left out: theirs is 1 by definition and says nothing about balance.

    Returns:
        None if no site with two streams or more sent its saliency. The bits do not depend on the order of replies.
    """
    terms: dict[str, list[tuple[float, float]]] = {}
    for reply in replies:
        if len(reply.saliency) > 1:
            for stream, saliency in reply.saliency.items():
                weight = sum(reply.weights.get(stream_group(stream), ()))
                terms.setdefault(stream, []).append((saliency, weight))
    return {stream: _capped_mean(sorted(terms[stream]), max_share) for stream in sorted(terms)} or None


def _capped_mean(terms: list[tuple[float, float]], max_share: float) -> float:
    """Mean of (value, weight) with capped weights; 1 if no weight is above 0."""
    weights = capped_weights([weight for _, weight in terms], max_share)
    total = sum(weights)
    return sum(value * weight for (value, _), weight in zip(terms, weights, strict=True)) / total if total else 1.0


def _coverage(replies: Mapping[str, RoundReply]) -> dict[str, list[str]]:
    """Stream -> sites whose replies trained it."""
    coverage: dict[str, list[str]] = {}
    for site, reply in replies.items():
        for group in reply.weights:
            if (stream := stream_of(group)) and any(reply.weights[group]):
                coverage.setdefault(stream, []).append(site)
    return dict(sorted(coverage.items()))


def _site_line(site: str, reply: RoundReply, outcome: RoundOutcome, seconds: float, bytes_down: int) -> dict[str, Any]:
    return {
        "seconds": round(seconds, 4),
        "state_round": reply.state_round,
        "loss": reply.loss,
        "validation_loss": reply.validation_loss,
        "num_skipped": reply.num_skipped,
        "saliency": dict(reply.saliency),
        "monitors": site_monitors(reply),
        "weights": dict(reply.weights),
        "shares": {group: round(share, 6) for group, share in outcome.shares[site].items()},
        "norms": {group: float(f"{norm:.4g}") for group, norm in outcome.norms[site].items()},
        "bytes_down": bytes_down,
        "bytes_up": outcome.site_bytes_up[site],
    }
