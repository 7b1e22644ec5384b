"""A ClientApp without a worker: it imports torch and trains the site's round itself, anew in every process."""

from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from client.records import pack, unpack
from panfm.sharing.messages import RoundTask
from panfm.site import Site

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train one round."""
    site = Site(Path(str(context.node_config["site-socket"])).parents[2])  # <site folder>/.panfm/run/worker.sock
    reply = site.train_round(RoundTask.from_records(unpack(message.content)))
    return Message(pack(reply.to_records()), reply_to=message)
