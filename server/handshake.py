"""Handshake before round 1: asks the sites for their streams and subjects, and compares their models."""

import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid

from panfm import __version__
from panfm.config import RunConfig, dump_toml, experiment_hash
from panfm.config.federation import FederationConfig
from panfm.config.site_dp import SiteDpConfig
from panfm.errors import ProtocolError, RunError, one_line
from panfm.sharing.groups import GroupManifest, stream_group
from panfm.sharing.messages import Handshake, Invitation
from panfm.texts import PLAIN_NAME
from server.exchange import Exchange, Watch, unwatched
from server.expected_sites import ExpectedSites
from server.quorum import NoQuorumError, is_final
from strategies.round_messages import unpack

_POLL_S = 0.2
_SETTLE_S = 10.0
"""When nobody knows how many sites will come: enough are there, and for this long no other has come."""


@dataclass
class Attendance:
    """Sites and nodes that answered an invitation."""

    roster: dict[int, Handshake] = field(default_factory=dict)
    """Node id -> handshake of each site that takes part, in the order of the sites' names."""
    failed: list[str] = field(default_factory=list)
    """One line for each node that cannot take part, with the reason; only that line names the site that it claims."""
    misfits: list[str] = field(default_factory=list)
    """One line for each whose software, model or numbers contradict the server's: a simulation must not start."""
    asked: list[int] = field(default_factory=list)
    """Node ids that were invited."""
    expected: ExpectedSites | None = None
    """The coordinator's table; without one any site may take part."""

    names: dict[int, str] = field(default_factory=dict)
    """Node id -> the node for people, as `describe_nodes` has it."""
    num_final: int = 0
    """Nodes among `failed` whose refusal asking again does not change."""

    def leave_out_misfits(self) -> None:
        """Let the run start without sites that do not fit, and without those under whose name several nodes answer."""
        names = Counter(handshake.site for handshake in self.roster.values())
        unique = {node: known for node, known in self.roster.items() if names[known.site] == 1}
        self.num_final += len(self.misfits) - len(_duplicates(self.roster.values()))
        self.roster = unique
        self.failed, self.misfits = sorted(self.failed + self.misfits), []

    def require(self, at_least: int) -> None:
        """Check who takes part.

        Raises:
            RunError: a site does not fit.
            NoQuorumError: fewer than `at_least` take part; the text names sites and reasons.
        """
        if self.misfits:
            raise RunError("; ".join(self.misfits))
        if len(self.roster) < at_least:
            reasons = "; ".join(self.failed) or "no other answered"
            raise NoQuorumError(
                f"{len(self.roster)} of at least {at_least} sites can take part: {reasons}",
                can_heal=self.expected is None or len(self.expected.sites) - self.num_final >= at_least,
            )


def shake_hands(
    grid: Grid,
    run: RunConfig,
    manifest: GroupManifest,
    *,
    num_sites: int | None = None,
    expected: ExpectedSites | None = None,
    watch: Watch = unwatched,
) -> Attendance:
    """Invite every node that is online. A site reads its images before it answers, so this may take a while.

    Args:
        num_sites: Wait for this many; when left out, for `federation.min-sites` and those that come soon after.
        expected: The coordinator's table of sites.
        watch: Called with the invitations; nodes have no site's name yet.
    Raises:
        NoQuorumError: too few nodes came online.
    """
    nodes = _wait_for_nodes(
        grid,
        num_sites or run.federation.min_sites,
        timeout_s=run.federation.join_timeout_s,
        settle_s=0.0 if num_sites else _SETTLE_S,
    )
    names = describe_nodes(grid, nodes)
    exchange = invite(grid, run, nodes, on_change=lambda changed: watch(changed, names))
    attendance = Attendance(asked=nodes, expected=expected, names=names)
    for reply in exchange:
        if handshake := read_handshake(reply, run, manifest, attendance):
            attendance.roster[reply.metadata.src_node_id] = handshake
    attendance.num_final = len(attendance.failed) + sum(map(is_final, exchange.failed.values()))
    attendance.failed += [f"{names[node_id]}: {reason}" for node_id, reason in exchange.failed.items()]
    attendance.failed.sort()
    attendance.misfits += _duplicates(attendance.roster.values())
    attendance.roster = dict(sorted(attendance.roster.items(), key=lambda entry: entry[1].site))
    return attendance


def describe_nodes(grid: Grid, nodes: Iterable[int]) -> dict[int, str]:
    """Node id -> the node for people: `node 123`, or `node 123 (name)` if it was registered under a name."""
    known = {node.node_id: node.name for node in grid.get_nodes()}
    return {node_id: f"node {node_id}" + (f" ({name})" if (name := known.get(node_id)) else "") for node_id in nodes}


def invite(
    grid: Grid, run: RunConfig, nodes: Iterable[int], *, on_change: Callable[[Exchange], None] = unwatched
) -> Exchange:
    """Ask nodes for their handshake. They have as long as for a round."""
    invitation = RecordDict({"config": ConfigRecord(dict(Invitation(dump_toml(run)).to_records().config))})
    timeout_s = run.federation.round_timeout_s
    messages = [Message(invitation, node_id, MessageType.QUERY, ttl=timeout_s, group_id="0") for node_id in nodes]
    return Exchange(grid, messages, timeout_s, on_change=on_change)


def read_handshake(reply: Message, run: RunConfig, manifest: GroupManifest, attendance: Attendance) -> Handshake | None:
    """Return the handshake in a reply; None if it is refused, and `attendance` then has the reason."""
    node_id = reply.metadata.src_node_id
    node = attendance.names.get(node_id, f"node {node_id}")
    try:
        handshake = Handshake.from_records(unpack(reply.content))
        _check_name(handshake.site)
    except ProtocolError as error:
        attendance.failed.append(f"{node}: {one_line(str(error))}")
        return None
    try:
        if attendance.expected:
            attendance.expected.check(handshake)
    except ProtocolError as error:
        attendance.failed.append(f"{node}: site {handshake.site}: {error}")
        return None
    try:
        check_handshake(handshake, run, manifest)
    except ProtocolError as error:
        attendance.misfits.append(f"{node}: site {handshake.site}: {one_line(str(error))}")
        return None
    return handshake


def check_handshake(handshake: Handshake, run: RunConfig, manifest: GroupManifest) -> None:
    """Raise ProtocolError, with the difference, if a site contradicts the server or itself."""
    if (version := handshake.versions.get("panfm")) != __version__:
        raise ProtocolError(f"panfm {version}, the server has {__version__}")
    _check_counts(handshake, run.streams, run.federation, run.site_dp)
    if handshake.experiment != (expected_hash := experiment_hash(run)):
        raise ProtocolError(
            f"its software reads the run description differently: experiment {one_line(handshake.experiment, 64)},"
            f" the server has {expected_hash}"
        )
    manifest.check_known(handshake.group_hashes)
    hashes = manifest.hashes()
    if changed := sorted(group for group, digest in handshake.group_hashes.items() if digest != hashes[group]):
        raise ProtocolError(f"the parameters of {', '.join(changed)} differ from the server's (layout hash)")
    streams = run.streams if run.sharing.rule == "plain" else handshake.streams
    of_streams = set(map(stream_group, streams)) & set(manifest.groups)
    expected = {group for group in manifest.groups if not group.startswith("stream:")} | of_streams
    if expected != (trained := set(handshake.group_hashes)):
        missing, extra = sorted(expected - trained), sorted(trained - expected)
        raise ProtocolError(f"groups it trains: missing {missing or 'none'}, not expected {extra or 'none'}")


def _check_counts(
    handshake: Handshake, streams: Iterable[str], federation: FederationConfig, site_dp: SiteDpConfig | None
) -> None:
    fewest, most = int(site_dp is None), federation.max_subjects
    if not fewest <= handshake.subjects <= most:
        raise ProtocolError(f"{handshake.subjects} subjects, expected {fewest} to {most} (federation.max-subjects)")
    if unknown := sorted(set(handshake.streams) - set(streams)):
        raise ProtocolError(f"holds {', '.join(unknown)}, unknown to this run")
    for stream, count in handshake.streams.items():
        if not fewest <= count <= handshake.subjects:
            raise ProtocolError(f"{count} subjects with {stream}, expected {fewest} to {handshake.subjects}")


def _check_name(site: str) -> None:
    if not PLAIN_NAME.fullmatch(site):
        raise ProtocolError(f"site name {site!r:.40}, expected small letters, digits, dot, dash")


def _duplicates(handshakes: Iterable[Handshake]) -> list[str]:
    names = Counter(handshake.site for handshake in handshakes)
    return [f"site {name}: {count} nodes answer under this name" for name, count in names.items() if count > 1]


def _wait_for_nodes(grid: Grid, at_least: int, *, timeout_s: float, settle_s: float) -> list[int]:
    """Nodes online, once there are enough and none has come or gone for `settle_s`, or the time is up."""
    start = settled = time.monotonic()
    nodes: list[int] = []
    while True:
        now = time.monotonic()
        if (online := sorted(grid.get_node_ids())) != nodes:
            nodes, settled = online, now
        is_over = now - start > timeout_s
        if len(nodes) >= at_least and (is_over or now - settled >= settle_s):
            return nodes
        if is_over:
            raise NoQuorumError(
                f"{len(nodes)} of at least {at_least} sites online after {timeout_s:g} s", can_heal=True
            )
        time.sleep(_POLL_S)
