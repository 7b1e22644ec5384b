"""ClientApp: carries Flower's messages to the site's own code and its answers back.

In a hospital the site's own code is its resident worker, at the end of the socket that the node config names. This
process, and the code in it that the server sent, hold no model and no image, and import no torch.

It always answers: a handler that returned nothing would leave a SuperNode waiting for good.
"""

import logging
from collections.abc import Callable
from functools import partial
from threading import Event

from flwr.app import Context, Error, Message, MessageType, RecordDict
from flwr.clientapp import ClientApp

from client.records import SITE_ERROR, pack, unpack
from client.relay import ask
from panfm.errors import ConfigError
from panfm.sharing.frames import Frame, Kind

_KINDS = {MessageType.QUERY: Kind.HANDSHAKE, MessageType.TRAIN: Kind.ROUND, MessageType.EVALUATE: Kind.SUMS}

logger = logging.getLogger(__name__)
app = ClientApp()


@app.query()
@app.train()
@app.evaluate()
def relay_message(message: Message, context: Context) -> Message:
    """Answer the handshake before round 1 (a query), a round (train), or a question for sums (evaluate)."""
    kind = message.metadata.message_type
    lost = Event()
    try:
        answer = _site(context, lost)(Frame(_KINDS[kind], unpack(message.content)))
        if answer.kind is Kind.ANSWER:
            return Message(pack(answer.records, asked_again=lost.is_set()), reply_to=message)
        reason = str(answer.records.config.get("reason"))
    except (Exception, SystemExit) as error:
        logger.exception("%s: answered with an error", kind)
        reason = f"{type(error).__name__}: the site's worker cannot be asked; the SuperNode's log tells more"
    return Message(Error(SITE_ERROR, reason), reply_to=message)


@app.query("ping")
def answer_ping(message: Message, _: Context) -> Message:
    """Answer a ping, which asks the site's worker nothing: SuperNode and ClientApp are at work."""
    return Message(RecordDict(), reply_to=message)


def _site(context: Context, lost: Event) -> Callable[[Frame], Frame]:
    """The site's worker at its socket, which sets `lost` if it goes away; in a simulation, the site in this process."""
    if path := context.node_config.get("site-socket"):
        return partial(ask, str(path), on_lost=lost.set)
    if not context.run_config.get("sites"):
        raise ConfigError("node-config: site-socket is missing, expected the path of the worker's socket")
    from client import simulated  # brings torch, which only a simulation needs here

    return partial(simulated.ask, context)
