"""Membership: which sites are asked in a round. Sites may come and go while a run goes on.

Before each round the server looks at which nodes are online. A new one is invited; it takes part from the first round
that begins after its handshake has come and fits, and nobody waits for it. A site that is offline is not asked.

A site that is online but lets the deadline pass twice in a row is silent: its worker hangs, or its SuperNode waits for
ever for a reply that its ClientApp never gave, and looks online all the same. A silent site is invited anew, and asked
again only once it has answered, and has rested for one round, then three, then seven. So a site that answers but is
always late does not cost every round its deadline, and one that never answers costs two deadlines. A site that does not
answer a ping (ping.py) is silent at once. Silent sites are invited again at growing intervals.

The name of a site stays with the node that first gave it. Flower keeps the id of a SuperNode that signs in with its
key, so such a site has the same node id after a restart. Without keys it gets a new one: then the name moves, once the
old node has been offline for a minute, and log, history and status page say so. With the coordinator's table of
expected sites no name moves.
"""

import logging
import time
from collections.abc import Collection, Mapping
from typing import Any

from flwr.serverapp import Grid

from panfm.config import RunConfig
from panfm.errors import one_line
from panfm.sharing.groups import GroupManifest
from panfm.sharing.messages import Handshake
from server.exchange import Exchange
from server.handshake import Attendance, describe_nodes, invite, read_handshake
from server.ping import Pings
from server.quorum import is_final

logger = logging.getLogger(__name__)
_SILENT_AFTER = 2
"""Deadlines in a row."""
_LONGEST_REST = 7
_MOVES_AFTER_S = 60.0
"""Seconds for which a node must be offline before another may answer in its site's name; Flower takes as long to notice
that a node is gone."""
_POLL_S, _POLL_SHARE, _LONGEST_POLL_S = 0.2, 0.05, 1.0
_INVITES_AGAIN_S = 60.0
"""A silent site is invited again after so long, then after twice as long, and so on."""


class Membership:
    """Sites of a run, and the nodes that ask to join it."""

    def __init__(
        self,
        grid: Grid,
        run: RunConfig,
        manifest: GroupManifest,
        attendance: Attendance,
        *,
        ping_timeout_s: float = 0.0,
    ) -> None:
        """Start with the sites that came before round 1.

        Args:
            attendance: Those sites; kept up to date.
            ping_timeout_s: As `federation.ping-timeout-s`; 0: no site is pinged.
        """
        self.attendance = attendance
        self.moved: dict[str, str] = {}
        """Site whose name moved to another node before this round -> from which to which."""
        self._grid = grid
        self._run = run
        self._manifest = manifest
        self._invited = set(attendance.asked)
        self._invitations: list[Exchange] = []
        self._unanswered = set(attendance.asked) - set(attendance.roster)
        """Nodes that were invited and did not answer, or with an error: invited again before the next round."""
        self._absent: dict[int, float] = {}
        """Node id of a site that is offline -> when that was noticed."""
        self._claimants: dict[int, Handshake] = {}
        """Node that answered in the name of a site whose own node has only just gone offline -> its handshake."""
        self._refused: dict[int, str] = {}
        """Node id -> why it cannot join."""
        self._unfit: set[int] = set()
        """Node ids among them whose answer to an invitation, or refusal, will be the same the next time."""
        self._missed: dict[str, list[int]] = {}
        """Site -> rounds in a row in which it let the deadline pass."""
        self._silent: set[int] = set()
        """Node ids of sites that must answer an invitation before they are asked again."""
        self._rests_until: dict[str, int] = {}
        self._pings = Pings(grid, ping_timeout_s, attendance.roster)
        self._no_ping: dict[str, str] = {}
        """Site that is silent because it did not answer a ping -> the reason."""
        self._invites_again: dict[int, tuple[float, float]] = {}
        """Node id of a silent site -> when it is invited again, and the pause after that."""

    def gather(self, round_number: int) -> dict[int, Handshake]:
        """Return the sites to ask in a round: fit, online, not silent, not resting, and answering a ping.

        Waits, up to `federation.join-timeout-s`, until there are `federation.min-sites`; sites that are silent or rest
        are asked before that.
        """
        start = time.monotonic()
        self._invited -= self._unanswered
        self._unanswered = set()
        self.moved = {}
        while True:
            present = self._present(round_number)
            if len(present) >= self._run.federation.min_sites:
                break
            if time.monotonic() - start > self._run.federation.join_timeout_s:
                return present
            time.sleep(min(_LONGEST_POLL_S, _POLL_S + _POLL_SHARE * (time.monotonic() - start)))
        awake = {node_id: known for node_id, known in present.items() if not self._why_not_asked(node_id, round_number)}
        chosen = awake if len(awake) >= self._run.federation.min_sites else present
        if unanswered := self._pings.unanswered(chosen):
            for node_id, reason in unanswered.items():
                self._note_no_ping(round_number, node_id, reason)
            self._present(round_number)  # which invites them
        return {node_id: known for node_id, known in chosen.items() if node_id not in unanswered}

    def num_candidates(self) -> int:
        """How many nodes are online that may still join: invited and without an answer, or with one that can heal."""
        return len(set(self._grid.get_node_ids()) - set(self.attendance.roster) - self._unfit)

    def note_heard(self, exchange: Exchange) -> None:
        """Note which sites answered an exchange: they need no ping for a while."""
        self._pings.note_heard(exchange)

    def _note_no_ping(self, round_number: int, node_id: int, reason: str) -> None:
        """Note that a site that looks online does not answer."""
        site = self.attendance.roster[node_id].site
        self._no_ping[site] = f"not answering: {reason} to a ping before round {round_number}"
        self._silent.add(node_id)
        self._invited.discard(node_id)
        logger.warning("round %s: %s is online but %s", round_number, site, self._no_ping[site])

    def note_late(self, line: Mapping[str, Any]) -> None:
        """Note which sites were late in a round, from its line of rounds.jsonl."""
        nodes = {known.site: node_id for node_id, known in self.attendance.roster.items()}
        for site in line["asked"]:
            missed = self._missed[site] = [*self._missed.get(site, ()), line["round"]] if site in line["late"] else []
            if len(missed) < _SILENT_AFTER:
                self._rests_until[site] = 0
                self._silent.discard(nodes[site])
                continue
            self._rests_until[site] = line["round"] + min(2 ** (len(missed) - 1) - 1, _LONGEST_REST)
            self._silent.add(nodes[site])
            self._invited.discard(nodes[site])
            logger.warning("round %s: %s is online but %s", line["round"], site, self._why_silent(site))

    def away(self, round_number: int, asked: Collection[str]) -> dict[str, str]:
        """Site, or node without a site's name -> why it was not asked in a round."""
        roster = self.attendance.roster
        reasons = {known.site: self._why_not_asked(node_id, round_number) for node_id, known in roster.items()}
        reasons |= {roster[node_id].site: "offline" for node_id in self._absent if node_id in roster}
        reasons |= {self._called(node_id): f"cannot join: {reason}" for node_id, reason in self._refused.items()}
        return {site: reason for site, reason in sorted(reasons.items()) if reason and site not in asked}

    def _why_not_asked(self, node_id: int, round_number: int) -> str:
        """Why a site that is online is not asked; empty if it is asked."""
        site = self.attendance.roster[node_id].site
        if node_id in self._silent:
            return self._why_silent(site)
        if self._rests_until.get(site, 0) >= round_number:
            return f"answers again, rests until round {self._rests_until[site]}"
        return ""

    def _why_silent(self, site: str) -> str:
        if site in self._no_ping:
            return f"{self._no_ping[site]}; not asked until it answers an invitation"
        rounds = ", ".join(map(str, dict.fromkeys(self._missed[site][-3:])))
        return f"silent: no reply by the deadline of rounds {rounds}; not asked until it answers an invitation"

    def _present(self, round_number: int) -> dict[int, Handshake]:
        online = set(self._grid.get_node_ids())
        self._invited &= online
        self._invite_silent_again()
        self._refused = {node_id: reason for node_id, reason in self._refused.items() if node_id in online}
        if strangers := sorted(online - self._invited - (set(self.attendance.roster) - self._silent)):
            self._invited |= set(strangers)
            self.attendance.names |= describe_nodes(self._grid, strangers)
            self._invitations.append(invite(self._grid, self._run, strangers))
        self._note_absent(round_number, online)
        self._read_answers(online)
        return {node_id: known for node_id, known in self.attendance.roster.items() if node_id in online}

    def _invite_silent_again(self) -> None:
        """Forget the invitation of a silent site after a while: its SuperNode may have lost it, started again."""
        if not self._pings.timeout_s:
            return
        now = time.monotonic()
        self._invites_again = {node: again for node, again in self._invites_again.items() if node in self._silent}
        for node_id in self._silent & self._invited:
            at, pause = self._invites_again.setdefault(node_id, (now + _INVITES_AGAIN_S, 2 * _INVITES_AGAIN_S))
            if now >= at:
                self._invites_again[node_id] = (now + pause, 2 * pause)
                self._invited.discard(node_id)

    def _note_absent(self, round_number: int, online: Collection[int]) -> None:
        """Note which sites' nodes are offline, and since when."""
        now, roster = time.monotonic(), self.attendance.roster
        absent = {node_id: self._absent.get(node_id, now) for node_id in roster if node_id not in online}
        for node_id in sorted(absent.keys() ^ self._absent.keys()):
            change = "is offline and is not asked" if node_id in absent else "is back"
            if node_id in roster:
                logger.warning("round %s: %s %s", round_number, roster[node_id].site, change)
        self._absent = absent

    def _read_answers(self, online: Collection[int]) -> None:
        """Admit or refuse the nodes that have answered an invitation by now."""
        claimants, self._claimants = self._claimants, {}
        for node_id, claimed in claimants.items():
            if node_id in online:
                self._admit(node_id, claimed, online)
        for exchange in self._invitations:
            for reply in exchange.ready():
                node_id = reply.metadata.src_node_id
                answer = Attendance(expected=self.attendance.expected, names=self.attendance.names)
                if handshake := read_handshake(reply, self._run, self._manifest, answer):
                    self._admit(node_id, handshake, online)
                for reason in [*answer.failed, *answer.misfits]:
                    self._refuse(node_id, reason.removeprefix(f"{self._called(node_id)}: "))
                    self._unfit.add(node_id)
            for node_id, reason in exchange.failed.items():
                self._refuse(node_id, reason)
                self._unfit |= {node_id} if is_final(reason) else set()
            self._pings.note_heard(exchange)
            self._unanswered |= set(exchange.failed) | (set() if exchange.is_waiting else exchange.waiting_for)
            exchange.failed.clear()
        self._invitations = [exchange for exchange in self._invitations if exchange.is_waiting]

    def _called(self, node_id: int) -> str:
        return self.attendance.names.get(node_id, f"node {node_id}")

    def _refuse(self, node_id: int, reason: str) -> None:
        """Log why a node cannot join, and keep the reason unless the node is a site's."""
        reason = one_line(reason)
        if self._refused.get(node_id) != reason:
            logger.warning("%s cannot join: %s", self._called(node_id), reason)
        if node_id not in self.attendance.roster:
            self._refused[node_id] = reason

    def _admit(self, node_id: int, handshake: Handshake, online: Collection[int]) -> None:
        """Add a node's site to the run, or refuse the node."""
        roster = self.attendance.roster
        namesakes = {other for other, known in roster.items() if known.site == handshake.site and other != node_id}
        if reason := self._why_not_named(node_id, handshake.site, namesakes, online):
            self._refuse(node_id, reason)
            return
        if gone := [other for other in namesakes if time.monotonic() - self._absent[other] < _MOVES_AFTER_S]:
            self._claimants[node_id] = handshake
            self._refuse(
                node_id, f"site {handshake.site} is node {gone[0]}, offline for less than {_MOVES_AFTER_S:g} s"
            )
            return
        for other in namesakes:
            self.moved[handshake.site] = f"moved from node {other} to node {node_id}, which says it is this site"
            logger.warning("%s %s", handshake.site, self.moved[handshake.site])
        self._silent -= {node_id, *namesakes}
        self._no_ping.pop(handshake.site, None)
        self._refused.pop(node_id, None)
        self._unfit.discard(node_id)
        everyone = {other: known for other, known in roster.items() if other not in namesakes} | {node_id: handshake}
        if everyone != roster:
            self.attendance.roster = dict(sorted(everyone.items(), key=lambda entry: entry[1].site))
        logger.warning("%s %s", handshake.site, "answers again" if node_id in roster else "joins")

    def _why_not_named(self, node_id: int, site: str, namesakes: Collection[int], online: Collection[int]) -> str:
        """Why a node may not answer in a site's name; empty if it may.

        Args:
            namesakes: Other nodes that have answered in this name.
        """
        known = self.attendance.roster.get(node_id)
        if known and known.site != site:
            return f"answered as site {known.site} before, now as site {site}"
        if set(namesakes) & set(online):
            return f"another node is online as site {site}"
        if namesakes and self.attendance.expected:
            return f"site {site} is another node's, and no name moves in a run with a table of expected sites"
        return ""
