"""Flower's floor: a ClientApp that returns what it was sent, untouched."""

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

app = ClientApp()


@app.train()
def echo(message: Message, _: Context) -> Message:
    """The question is the answer."""
    return Message(message.content, reply_to=message)
