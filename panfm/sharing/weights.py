"""How much a site counts in the mean of a group.

    stream:S          subjects of the site that hold S; nothing if no local step was done
    everything else   subjects trained x local steps done

Both ends use it: the site for the weight it sends, the server for the most it may send, given its handshake.
"""

from collections.abc import Mapping

from panfm.config import RunConfig
from panfm.sharing.groups import stream_of


def group_weight(
    run: RunConfig, group: str, *, subjects: int, subjects_per_stream: Mapping[str, int], num_steps: int
) -> float:
    """Weight of one site in one group. Under the `plain` rule a stream's group weighs as any other.

    Args:
        num_steps: Local steps done, skipped ones not counted.
    """
    stream = stream_of(group)
    if stream is None or run.sharing.rule == "plain":
        return float(subjects * num_steps)
    return float(subjects_per_stream.get(stream, 0)) if num_steps else 0.0
