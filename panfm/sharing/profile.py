"""The federation's saliency profile: how much the model leans on each stream, over all sites."""

from collections.abc import Iterable

from panfm.sharing.groups import stream_group
from panfm.sharing.messages import RoundReply
from panfm.sharing.shares import capped_weights


def federated_profile(replies: Iterable[RoundReply], max_share: float = 1.0) -> dict[str, float] | None:
    """Mean saliency per stream, weighted as the stream's parameters are, and capped as they are.

    Saliency is relative to an equal split (1: the stream's fair share). Sites with one stream are left out: theirs is
    1 by definition and says nothing about balance.

    Returns:
        None if no site with two streams or more sent its saliency. The bits do not depend on the order of replies.
    """
    terms: dict[str, list[tuple[float, float]]] = {}
    for reply in replies:
        if len(reply.saliency) > 1:
            for stream, saliency in reply.saliency.items():
                weight = sum(reply.weights.get(stream_group(stream), ()))
                terms.setdefault(stream, []).append((saliency, weight))
    return {stream: _mean(sorted(terms[stream]), max_share) for stream in sorted(terms)} or None


def _mean(terms: list[tuple[float, float]], max_share: float) -> float:
    weights = capped_weights([weight for _, weight in terms], max_share)
    total = sum(weights)
    return (
        sum(saliency * weight for (saliency, _), weight in zip(terms, weights, strict=True)) / total if total else 1.0
    )
