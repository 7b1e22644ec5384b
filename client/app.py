"""ClientApp: carries Flower's messages to the site's own code and its answers back.

It always answers: a handler that returned nothing would leave a SuperNode waiting for good. What goes wrong at a site
comes back as an error of one scrubbed line under the site's public name; the whole story stays in the site's log.
"""

import logging
from collections.abc import Callable
from pathlib import Path

from flwr.app import Context, Error, Message
from flwr.clientapp import ClientApp

from client.records import pack, unpack
from panfm.config import site_folders
from panfm.errors import ConfigError
from panfm.sharing.messages import Invitation, Records, RoundTask
from panfm.site import Site, resident_site, scrub

SITE_ERROR = 1000
"""Code of our own error replies; Flower's are below 100."""

logger = logging.getLogger(__name__)
app = ClientApp()


@app.query()
def shake_hands(message: Message, context: Context) -> Message:
    """Before round 1: what this site holds."""
    return _answer(message, context, lambda site, asked: site.handshake(Invitation.from_records(asked)).to_records())


@app.train()
def train_round(message: Message, context: Context) -> Message:
    """One round."""
    return _answer(message, context, lambda site, asked: site.train_round(RoundTask.from_records(asked)).to_records())


def _answer(message: Message, context: Context, handle: Callable[[Site, Records], Records]) -> Message:
    site = None
    try:
        site = _site(context)
        return Message(pack(handle(site, unpack(message.content))), reply_to=message)
    except (Exception, SystemExit) as error:
        logger.exception("%s: answered with an error", message.metadata.message_type)
        if site:
            site.log_error(error)
        who = f"site {site.config.name}: " if site else ""
        return Message(Error(SITE_ERROR, who + scrub(error)), reply_to=message)


def _site(context: Context) -> Site:
    """The hospital's own folder (node config); in a simulation, the partition's folder (run config)."""
    if folder := context.node_config.get("site-folder"):
        return resident_site(Path(str(folder)))
    sites, run_dir = str(context.run_config.get("sites", "")), str(context.run_config.get("run-dir", ""))
    if not sites:
        raise ConfigError("node-config: site-folder is missing, expected the path of this site's folder")
    home = site_folders(Path(sites))[int(context.node_config["partition-id"])]
    return resident_site(home, Path(run_dir, "sites", home.name) if run_dir else None)
