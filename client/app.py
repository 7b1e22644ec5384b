"""ClientApp: carries Flower's messages to the site's own code and its answers back.

In a hospital the site's own code is its resident worker, at the end of the socket that the node config names. This
process, and the code in it that the server sent, hold no model and no image, and import no torch.

It always answers: a handler that returned nothing would leave a SuperNode waiting for good.
"""

import logging

from flwr.app import Context, Error, Message
from flwr.clientapp import ClientApp

from client.records import pack, unpack
from client.relay import ask
from panfm.errors import ConfigError
from panfm.sharing.frames import Frame, Kind

SITE_ERROR = 1000
"""Code of our own error replies; Flower's are below 100."""

logger = logging.getLogger(__name__)
app = ClientApp()


@app.query()
def shake_hands(message: Message, context: Context) -> Message:
    """Before round 1: what this site holds."""
    return _answer(Kind.HANDSHAKE, message, context)


@app.train()
def train_round(message: Message, context: Context) -> Message:
    """One round."""
    return _answer(Kind.ROUND, message, context)


def _answer(kind: Kind, message: Message, context: Context) -> Message:
    try:
        answer = _ask(context, Frame(kind, unpack(message.content)))
        if answer.kind is Kind.ANSWER:
            return Message(pack(answer.records), reply_to=message)
        reason = str(answer.records.config.get("reason"))
    except (Exception, SystemExit) as error:
        logger.exception("%s: answered with an error", message.metadata.message_type)
        reason = f"{type(error).__name__}: the site's worker cannot be asked; the SuperNode's log tells more"
    return Message(Error(SITE_ERROR, reason), reply_to=message)


def _ask(context: Context, question: Frame) -> Frame:
    if path := context.node_config.get("site-socket"):
        return ask(str(path), question)
    if not context.run_config.get("sites"):
        raise ConfigError("node-config: site-socket is missing, expected the path of the worker's socket")
    from client import simulated  # brings torch, which only a simulation needs here

    return simulated.ask(context, question)
