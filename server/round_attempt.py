"""One attempt at a round: asks the chosen sites to train, and aggregates their replies if they are enough.

An attempt with too few good replies leaves nothing behind, here or at the server's strategy. A site that is asked
again starts from the private state that it started from the first time, so its answer has the same bits; under
patient-level privacy it repeats the reply that it has paid for (panfm/site/kept_reply.py).
"""

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord
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

    def __call__(self) -> tuple[ServerState, dict[str, Any]]:
        """Return the state after the round, and its line for rounds.jsonl.

        Raises:
            NoQuorumError: too few good replies.
        """
        number, strategy, membership = self.before.round_number + 1, self.strategy, self.membership
        strategy.roster = self.choose(number)
        strategy.memory = self.before.memory
        state, line, exchange = train_round(self.grid, strategy, self.before, watch=self.watch)
        membership.note_heard(exchange)
        line |= {"away": membership.away(number, line["asked"]), "moved": membership.moved}
        membership.note_late(line)
        for site, reason in line["rejected"].items():
            logger.warning("round %s: %s left out: %s", number, site, reason)
        if len(line["sites"]) < strategy.run.federation.min_sites:
            raise self._no_quorum(line)
        return state, line

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
        others = {handshake.site for handshake in roster} - refused
        can_heal = len(others) + self.membership.num_candidates() >= needed
        return NoQuorumError(text, can_heal=can_heal, line=line)


def train_round(
    grid: Grid,
    strategy: GroupedMean,
    before: ServerState,
    *,
    watch: Watch = unwatched,
) -> tuple[ServerState, dict[str, Any], Exchange]:
    """Ask the strategy's sites to train, and aggregate their replies.

    Returns:
        The state after the round, its line for rounds.jsonl, and the exchange of messages.
    """
    start, number, run = time.monotonic(), before.round_number + 1, strategy.run
    task = RoundTask(before.run_id, number, dump_toml(run), before.groups, before.profile)
    config = ConfigRecord(dict(task.to_records().config))
    arrays = ArrayRecord({group: make_array(flat) for group, flat in before.groups.items()})
    messages = strategy.configure_train(number, arrays, config, grid)
    exchange = Exchange(
        grid,
        messages,
        run.federation.round_timeout_s,
        on_change=lambda changed: watch(changed, {node: known.site for node, known in strategy.asked.items()}),
    )
    arrays, _ = strategy.aggregate_train(number, exchange)
    line = round_line(number, time.monotonic() - start, exchange, strategy)
    groups, profile = view_arrays(arrays), line["profile"] or before.profile
    return ServerState(before.run_id, number, groups, profile, strategy.memory), line, exchange
