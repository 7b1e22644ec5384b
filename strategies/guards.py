"""What a reply must be before its numbers are looked at."""

from collections.abc import Mapping

from panfm.errors import ProtocolError
from panfm.sharing.messages import Handshake, RoundReply
from panfm.sharing.weights import Weights


def check_reply(
    reply: RoundReply,
    handshake: Handshake,
    limits: Mapping[str, Weights],
    *,
    of: tuple[str, int],
) -> None:
    """Refuse a reply that is stale or incomplete, or says of itself what cannot be.

    Args:
        limits: Group -> the most the site may weigh in it.
        of: Run id and round that are being answered.
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
    for group, weights in reply.weights.items():
        for weight, limit in zip(weights, limits[group], strict=False):
            if not 0.0 <= weight <= limit:
                raise ProtocolError(f"{group}: weight {weight:g}, expected 0 to {limit:g} by the site's handshake")


def _check_saliency(reply: RoundReply, handshake: Handshake) -> None:
    """Relative to an equal split it cannot exceed the number of streams; twice that leaves room for privacy's noise."""
    limit = 2.0 * max(len(handshake.streams), 1)
    for stream, saliency in reply.saliency.items():
        if stream not in handshake.streams or not 0.0 <= saliency <= limit:
            raise ProtocolError(f"saliency of {stream:.40}: {saliency:g}, expected 0 to {limit:g} of a stream it holds")
