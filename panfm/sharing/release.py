"""Builds the messages that leave a site. There are four ways out:

    build_handshake             the answer to an invitation
    build_reply                 the answer to a round's task
    build_sums_reply            the answer to a question for sums over patients, or for an evaluation
    panfm.site.handler.scrub    an error: its kind, and nothing that was written at the site

Every field of the first three is either the server's own words sent back (which run, which round, whether private state
was at hand), what the site is (its public name, its software), or is released under one name of `Releasable`. What the
site's `limits.may-leave` does not name stays.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from panfm.config import Releasable
from panfm.errors import ProtocolError
from panfm.sharing.coding import Arrays
from panfm.sharing.groups import GroupManifest
from panfm.sharing.messages import Handshake, RoundReply, RoundTask
from panfm.sharing.weights import Weights

if TYPE_CHECKING:
    from panfm.sharing.sums_messages import SumsReply

HANDSHAKE_RELEASED_UNDER = {
    "subjects": Releasable.COUNTS,
    "streams": Releasable.COUNTS,
    "group_hashes": Releasable.COUNTS,
}
"""Field of a handshake -> the name under which the site allows it; the groups tell which streams it holds."""
RELEASED_UNDER = {
    "updates": Releasable.UPDATES,
    "weights": Releasable.COUNTS,
    "loss": Releasable.LOSS,
    "validation_loss": Releasable.LOSS,
    "num_skipped": Releasable.LOSS,
    "saliency": Releasable.SALIENCY,
    "monitors": Releasable.MONITORS,
}
"""Field of a reply -> the name under which the site allows it."""
SUMS_RELEASED_UNDER = {
    "sums": Releasable.LABEL_SUMS,
    "errors": Releasable.LABEL_SUMS,
    "loss": Releasable.LOSS,
    "loss_subjects": Releasable.COUNTS,
    "inputs": Releasable.INPUT_SUMS,
    "score": Releasable.EVALUATION,
    "scored": Releasable.COUNTS,
}
"""Field of the answer to a question for sums -> the name under which the site allows it."""
NEEDED = (Releasable.UPDATES, Releasable.COUNTS)
"""Without these a site cannot take part."""


@dataclass(frozen=True)
class RoundResult:
    """Result of a round at a site, before `limits.may-leave` decides which fields leave."""

    state_round: int
    updates: Arrays
    """Local minus global parameters, packed and coded."""
    weights: Mapping[str, Weights]
    loss: float | None
    validation_loss: float | None
    num_skipped: int | None
    saliency: Mapping[str, float]
    monitors: Mapping[str, float]
    is_repeat: bool = False
    """Whether the same question has had this result before, which was paid for then."""


def check_may_take_part(may_leave: Collection[Releasable]) -> None:
    """Raises ProtocolError if the site forbids a field that every round needs."""
    for needed in NEEDED:
        if needed not in may_leave:
            raise ProtocolError(f"this site's limits.may-leave lacks {needed.value}, which every round needs")


def build_handshake(
    site: str,
    experiment: str,
    manifest: GroupManifest,
    versions: Mapping[str, str],
    *,
    subjects: int,
    streams: Mapping[str, int],
    may_leave: Collection[Releasable],
) -> Handshake:
    """Build the answer to an invitation.

    Guarantees:
        closed: it holds nothing but `HANDSHAKE_RELEASED_UNDER`, the site's public name, versions of its software, and
            a hash of the server's run description as this site reads it.

    Args:
        site: Public name.
        experiment: Hash of the server's description, as this site reads it.
        manifest: Layout of the groups that the site trains.
        streams: Stream of the site -> subjects with it.
    Raises:
        ProtocolError: the site forbids updates or counts.
    """
    check_may_take_part(may_leave)
    return Handshake(site, subjects, streams, versions, experiment, manifest.hashes())


def build_reply(task: RoundTask, result: RoundResult, *, may_leave: Collection[Releasable]) -> RoundReply:
    """Build the reply to a task.

    Guarantees:
        closed: the reply holds nothing but `RELEASED_UNDER`, restricted to `may_leave`, and the three words of the
            protocol (run, round, state round).
    Raises:
        ProtocolError: the site forbids updates or counts.
    """
    check_may_take_part(may_leave)
    allowed: dict[str, Any] = {
        field: getattr(result, field) for field, name in RELEASED_UNDER.items() if name in may_leave
    }
    return RoundReply(task.run_id, task.round_number, result.state_round, **allowed)


def build_sums_reply(task: RoundTask, result: Mapping[str, Any], *, may_leave: Collection[Releasable]) -> "SumsReply":
    """Build the answer to a question for sums over patients.

    Guarantees:
        closed: the answer holds nothing but `SUMS_RELEASED_UNDER`, restricted to `may_leave`, and the two words of the
            protocol (run, round).
    Args:
        result: Field of the answer -> its value.
    """
    from panfm.sharing.sums_messages import SumsReply  # a worker that is never asked does without

    allowed = {
        field: result[field] for field, name in SUMS_RELEASED_UNDER.items() if field in result and name in may_leave
    }
    return SumsReply(task.run_id, task.round_number, **allowed)
