"""Who is asked, round by round: sites may come and go while a run goes on.

Before each round the nodes that are online are looked at. A new one is invited; it takes part from the first round that
begins after its handshake has come and fits, and nobody waits for it. A site that is offline is not asked. One that
is online but let the deadline pass is asked again in the next round; from the second time in a row it rests for one
round, then three, then seven, so that a site that hangs does not cost every round its deadline.
"""

import logging
import time
from collections.abc import Collection, Mapping
from typing import Any

from flwr.serverapp import Grid

from panfm.config import RunConfig
from panfm.sharing.groups import GroupManifest
from panfm.sharing.messages import Handshake
from server.exchange import Exchange
from server.handshake import Attendance, invite, read_handshake

logger = logging.getLogger(__name__)
_LONGEST_REST = 7
_POLL_S = 0.2


class Roster:
    """The sites of a run, and the nodes that would join it."""

    def __init__(self, grid: Grid, run: RunConfig, manifest: GroupManifest, attendance: Attendance) -> None:
        """Start with those that came before round 1; `attendance` is kept up to date."""
        self.attendance = attendance
        self._grid = grid
        self._run = run
        self._manifest = manifest
        self._invited = set(attendance.asked)
        self._invitations: list[Exchange] = []
        self._unheard: set[int] = set()
        """Invited, but with no answer, or an error: invited again before the next round."""
        self._absent: set[int] = set()
        self._late: dict[str, int] = {}
        """Site -> rounds in a row in which it let the deadline pass."""
        self._rests_until: dict[str, int] = {}

    def gather(self, round_number: int) -> dict[int, Handshake]:
        """The sites to ask in a round: fit, online, not resting.

        Waits, up to `federation.join-timeout-s`, until there are `federation.min-sites`; sites that rest are asked
        before that.
        """
        start = time.monotonic()
        self._invited -= self._unheard
        self._unheard = set()
        while True:
            present = self._present(round_number)
            if len(present) >= self._run.federation.min_sites:
                break
            if time.monotonic() - start > self._run.federation.join_timeout_s:
                return present
            time.sleep(_POLL_S)
        awake = {n: known for n, known in present.items() if self._rests_until.get(known.site, 0) < round_number}
        return awake if len(awake) >= self._run.federation.min_sites else present

    def note(self, line: Mapping[str, Any]) -> None:
        """Remember who was late in a round, from its line of rounds.jsonl."""
        for site in line["asked"]:
            times = self._late[site] = self._late.get(site, 0) + 1 if site in line["late"] else 0
            self._rests_until[site] = line["round"] + (min(2 ** (times - 1) - 1, _LONGEST_REST) if times else 0)

    def _present(self, round_number: int) -> dict[int, Handshake]:
        online = set(self._grid.get_node_ids())
        self._invited &= online
        if strangers := sorted(online - self._invited - set(self.attendance.roster)):
            self._invited |= set(strangers)
            self._invitations.append(invite(self._grid, self._run, strangers))
        self._hear(online)
        absent = set(self.attendance.roster) - online
        for node_id in sorted(absent ^ self._absent):
            what = "is offline and is not asked" if node_id in absent else "is back"
            if node_id in self.attendance.roster:
                logger.warning("round %s: %s %s", round_number, self.attendance.roster[node_id].site, what)
        self._absent = absent
        return {node_id: known for node_id, known in self.attendance.roster.items() if node_id in online}

    def _hear(self, online: Collection[int]) -> None:
        """Take in whoever has answered an invitation by now."""
        for exchange in self._invitations:
            heard = Attendance()
            for reply in exchange.ready():
                if handshake := read_handshake(reply, self._run, self._manifest, heard):
                    self._welcome(reply.metadata.src_node_id, handshake, online)
            for reason in [*heard.failed, *heard.misfits, *exchange.failed.values()]:
                logger.warning("cannot join: %s", reason)
            self._unheard |= set(exchange.failed) | (set() if exchange.is_waiting else exchange.waiting_for)
            exchange.failed.clear()
        self._invitations = [exchange for exchange in self._invitations if exchange.is_waiting]

    def _welcome(self, node_id: int, handshake: Handshake, online: Collection[int]) -> None:
        namesakes = {other for other, known in self.attendance.roster.items() if known.site == handshake.site}
        if namesakes & set(online):
            logger.warning("cannot join: another node is online as site %s", handshake.site)
            return
        kept = {other: known for other, known in self.attendance.roster.items() if other not in namesakes}
        everyone = kept | {node_id: handshake}
        self.attendance.roster = dict(sorted(everyone.items(), key=lambda entry: entry[1].site))
        logger.warning("%s joins", handshake.site)
