"""A ClientApp that returns its message untouched: the least that Flower takes."""

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

app = ClientApp()


@app.train()
def echo(message: Message, _: Context) -> Message:
    """Return the content of the message."""
    return Message(message.content, reply_to=message)
