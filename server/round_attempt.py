"""One attempt at a round: asks the chosen sites to train, and aggregates their replies if they are enough.

An attempt with too few good replies leaves nothing behind, here or at the server's strategy. A site that is asked
again starts from the private state that it started from the first time, so its answer has the same bits. Under
patient-level privacy it would draw new noise and pay once more: the replies to the first attempt are therefore kept
until the round is done, and these sites are not asked again. A site without a reply may have paid all the same: it is
asked once more in this round, and no more than that.
"""

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from panfm.config import dump_toml
from panfm.sharing.messages import Handshake, RoundTask
from server.checkpoint import ServerState
from server.exchange import Exchange, Watch, unwatched
from server.membership import Membership
from server.quorum import NoQuorumError, is_final
from server.round_line import round_line
from strategies import GroupedMean
from strategies.round_messages import make_array, view_arrays

logger = logging.getLogger(__name__)
KeptReplies = dict[int, tuple[Message, RecordDict]]
"""Node id -> its reply, and a copy of the content."""
_MOST_PAID = 2
"""Questions of one private round to one site that may remain without a reply."""


@dataclass
class RoundAttempt:
    """Attempts at one round of a run; call it until one has a quorum."""

    grid: Grid
    strategy: GroupedMean
    membership: Membership
    before: ServerState
    choose: Callable[[int], Mapping[int, Handshake]]
    """Sites to ask in a round, by node id."""
    watch: Watch = unwatched
    _kept: KeptReplies = field(default_factory=dict)
    _unanswered: Counter[int] = field(default_factory=Counter)
    """Under patient-level privacy: node id -> questions of this round without a reply; it may have paid for each."""

    def __call__(self) -> tuple[ServerState, dict[str, Any]]:
        """Return the state after the round, and its line for rounds.jsonl.

        Raises:
            NoQuorumError: too few good replies.
        """
        number, strategy, membership = self.before.round_number + 1, self.strategy, self.membership
        strategy.roster = self._choose_payable(number)
        strategy.memory = self.before.memory
        state, line, exchange = train_round(self.grid, strategy, self.before, kept=self._kept, watch=self.watch)
        membership.note_heard(exchange)
        if strategy.run.patient_dp is not None:
            self._unanswered.update(exchange.failed.keys() - exchange.errors)
        line |= {"away": membership.away(number, line["asked"]), "moved": membership.moved}
        membership.note_late(line)
        for site, reason in line["rejected"].items():
            logger.warning("round %s: %s left out: %s", number, site, reason)
        if len(line["sites"]) < strategy.run.federation.min_sites:
            raise self._no_quorum(line)
        return state, line

    def _choose_payable(self, number: int) -> Mapping[int, Handshake]:
        """Choose the sites to ask, without those that may have paid for this round too often.

        Raises:
            NoQuorumError: too few are left.
        """
        chosen, needed = self.choose(number), self.strategy.run.federation.min_sites
        payable = {node: known for node, known in chosen.items() if self._unanswered[node] < _MOST_PAID}
        if len(payable) < needed <= len(chosen):
            sites = ", ".join(known.site for node, known in chosen.items() if node not in payable)
            text = f"round {number}: {len(payable)} of at least {needed} sites left (federation.min-sites): {sites}"
            raise NoQuorumError(
                f"{text} did not answer {_MOST_PAID} questions and may have paid for each", can_heal=False
            )
        return payable

    def _no_quorum(self, line: Mapping[str, Any]) -> NoQuorumError:
        """The error of an attempt; its text says why each of the others failed."""
        needed, roster = self.strategy.run.federation.min_sites, self.membership.attendance.roster.values()
        reasons = line["rejected"] | line["away"]
        refused = {site for site, reason in line["rejected"].items() if is_final(reason)}
        refused |= self.strategy.outcome.rejected.keys()
        text = (
            f"round {line['round']}: {len(line['sites'])} good replies, at least {needed} needed "
            f"(federation.min-sites): {'; '.join(f'{site}: {reason}' for site, reason in reasons.items())}"
        )
        can_heal = len({handshake.site for handshake in roster} - refused) >= needed
        return NoQuorumError(text, can_heal=can_heal, line=line)


def train_round(
    grid: Grid,
    strategy: GroupedMean,
    before: ServerState,
    *,
    kept: KeptReplies | None = None,
    watch: Watch = unwatched,
) -> tuple[ServerState, dict[str, Any], Exchange]:
    """Ask the strategy's sites to train, and aggregate their replies.

    Args:
        kept: Replies to an earlier attempt, whose sites are not asked; those that must be kept are added.
    Returns:
        The state after the round, its line for rounds.jsonl, and the exchange of messages.
    """
    start, number, run = time.monotonic(), before.round_number + 1, strategy.run
    kept = {} if kept is None else kept
    task = RoundTask(before.run_id, number, dump_toml(run), before.groups, before.profile)
    config = ConfigRecord(dict(task.to_records().config))
    arrays = ArrayRecord({group: make_array(flat) for group, flat in before.groups.items()})
    messages = strategy.configure_train(number, arrays, config, grid)
    exchange = Exchange(
        grid,
        (message for message in messages if message.metadata.dst_node_id not in kept),
        run.federation.round_timeout_s,
        may_repeat=run.patient_dp is None,
        on_change=lambda changed: watch(changed, {node: known.site for node, known in strategy.asked.items()}),
    )
    arrays, _ = strategy.aggregate_train(number, _replies(exchange, strategy, kept))
    line = round_line(number, time.monotonic() - start, exchange, strategy)
    groups, profile = view_arrays(arrays), line["profile"] or before.profile
    return ServerState(before.run_id, number, groups, profile, strategy.memory), line, exchange


def _replies(exchange: Exchange, strategy: GroupedMean, kept: KeptReplies) -> Iterator[Message]:
    """Yield the replies that are kept, and those of the exchange; keep these if asking again would cost."""
    for node_id, (reply, content) in list(kept.items()):
        if node_id in strategy.asked:
            exchange.seconds[node_id] = 0.0
            reply.content = _copy(content)
            yield reply
    for reply in exchange:
        if strategy.run.patient_dp is not None:
            kept[reply.metadata.src_node_id] = (reply, _copy(reply.content))
        yield reply


def _copy(content: RecordDict) -> RecordDict:
    """A record of the same arrays, which stay when the other record is read."""
    arrays = {name: ArrayRecord(dict(record)) for name, record in content.array_records.items()}
    return RecordDict({**content, **arrays})
