"""Before round 1: who is there, what each site holds, and whether it speaks of the same model."""

import time
from collections.abc import Callable

from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid

from panfm import __version__
from panfm.config import RunConfig, config_hash, dump_toml
from panfm.errors import ProtocolError, RunError
from panfm.sharing.groups import GroupManifest, stream_group
from panfm.sharing.messages import Handshake, Invitation
from server.exchange import Exchange
from strategies.records import unpack

_POLL_S = 0.2


def shake_hands(
    grid: Grid,
    run: RunConfig,
    manifest: GroupManifest,
    *,
    at_least: int,
    on_site: Callable[[Handshake], None] = lambda _: None,
) -> dict[int, Handshake]:
    """Invite every node that is online. A site reads its images before it answers, so this may take a while.

    Args:
        at_least: Fewer sites than this are too few.
        on_site: Told of each site as it comes.
    Returns:
        Node id -> handshake, in the order of the sites' names.
    Raises:
        RunError: too few sites came or could take part, or one does not fit; the line names the site and the reason.
    """
    invitation = RecordDict({"config": ConfigRecord(dict(Invitation(dump_toml(run)).to_records().config))})
    timeout_s = run.federation.round_timeout_s
    exchange = Exchange(
        grid,
        [
            Message(invitation, node_id, MessageType.QUERY, ttl=timeout_s, group_id="0")
            for node_id in _wait_for_nodes(grid, at_least, run.federation.join_timeout_s)
        ],
        timeout_s,
    )
    roster: dict[int, Handshake] = {}
    for reply in exchange:
        handshake = Handshake.from_records(unpack(reply.content))
        check_handshake(handshake, run, manifest)
        roster[reply.metadata.src_node_id] = handshake
        on_site(handshake)
    if len(roster) < at_least:
        reasons = "; ".join(sorted(set(exchange.failed.values())))
        raise RunError(f"{len(roster)} of at least {at_least} sites can take part: {reasons}")
    names = [handshake.site for handshake in roster.values()]
    if twice := {name for name in names if names.count(name) > 1}:
        raise RunError(f"site {min(twice)}: more than one node answers under this name")
    return dict(sorted(roster.items(), key=lambda entry: entry[1].site))


def check_handshake(handshake: Handshake, run: RunConfig, manifest: GroupManifest) -> None:
    """Raises RunError if a site's version, run description or model differs from the server's."""
    site = handshake.site
    if (found := handshake.versions.get("panfm")) != __version__:
        raise RunError(f"site {site}: panfm {found}, the server has {__version__}")
    if handshake.config_hash != config_hash(run):
        raise RunError(f"site {site}: reads the run description differently (configuration hash)")
    try:
        manifest.check_known(handshake.group_hashes)
    except ProtocolError as error:
        raise RunError(f"site {site}: {error}") from error
    hashes = manifest.hashes()
    for group, found in handshake.group_hashes.items():
        if found != hashes[group]:
            raise RunError(f"site {site}: the parameters of {group} differ from the server's (layout hash)")
    streams = run.streams if run.sharing.rule == "plain" else handshake.streams
    expected = {group for group in manifest.groups if not group.startswith("stream:")} | set(map(stream_group, streams))
    if expected != set(handshake.group_hashes):
        raise RunError(f"site {site}: trains {sorted(handshake.group_hashes)}, expected {sorted(expected)}")


def _wait_for_nodes(grid: Grid, at_least: int, timeout_s: float) -> list[int]:
    start = time.monotonic()
    while len(nodes := sorted(grid.get_node_ids())) < at_least:
        if time.monotonic() - start > timeout_s:
            raise RunError(f"{len(nodes)} of at least {at_least} sites online after {timeout_s:g} s")
        time.sleep(_POLL_S)
    return nodes
