"""What a reply must be before it may touch the global model."""

from collections.abc import Mapping

from panfm.errors import ProtocolError
from panfm.sharing.messages import Handshake, RoundReply
from panfm.sharing.weights import Weights
from strategies.means import GroupMean


def check_reply(
    reply: RoundReply,
    handshake: Handshake,
    means: Mapping[str, GroupMean],
    limits: Mapping[str, Weights],
    *,
    of: tuple[str, int],
) -> dict[str, float]:
    """Refuse a reply that is stale, incomplete, malformed, or out of bounds.

    Args:
        means: Group -> the mean it would enter.
        limits: Group -> the most the site may weigh in it.
        of: Run id and round that are being answered.
    Returns:
        Group -> L2 norm of its update.
    Raises:
        ProtocolError: the reason, on one line.
    """
    if (reply.run_id, reply.round_number) != of:
        raise ProtocolError(f"answers round {reply.round_number} of {reply.run_id}, expected round {of[1]} of {of[0]}")
    expected = set(handshake.group_hashes)
    for what, found in (("updates", set(reply.updates)), ("weights", set(reply.weights))):
        if found != expected:
            missing, extra = sorted(expected - found), sorted(found - expected)
            raise ProtocolError(f"{what}: missing {missing or 'none'}, not expected {extra or 'none'}")
    if not any(map(any, reply.weights.values())):
        raise ProtocolError("all local steps were skipped: in none were loss and gradient finite")
    _check_saliency(reply, handshake)
    norms = {}
    for group, update in reply.updates.items():
        for weight, limit in zip(reply.weights[group], limits[group], strict=False):
            if not 0.0 <= weight <= limit:
                raise ProtocolError(f"{group}: weight {weight:g}, expected 0 to {limit:g} by the site's handshake")
        try:
            norms[group] = means[group].check(update, reply.weights[group])
        except ProtocolError as error:
            raise ProtocolError(f"{group}: {error}") from error
    return norms


def _check_saliency(reply: RoundReply, handshake: Handshake) -> None:
    """Relative to an equal split it cannot exceed the number of streams; twice that leaves room for privacy's noise."""
    limit = 2.0 * max(len(handshake.streams), 1)
    for stream, saliency in reply.saliency.items():
        if stream not in handshake.streams or not 0.0 <= saliency <= limit:
            raise ProtocolError(f"saliency of {stream:.40}: {saliency:g}, expected 0 to {limit:g} of a stream it holds")
