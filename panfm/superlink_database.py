"""A SuperLink's database that waits for its lock: `--database "sqlite:////path/superlink.db?plugin=panfm"`.

Flower lets a statement wait five seconds. While a disk is busy for longer, with a large reply or somebody's checkpoint,
its SuperLink then answers with a server error, and every process that gets it ends: SuperNodes, the SuperExec, and with
it the run. It lies here, and not in `server`, because a SuperLink runs where the wheel is, which holds `panfm` alone.
"""

from typing import Any

from sqlalchemy import URL, event
from sqlalchemy.engine import CreateEnginePlugin, Engine

WAIT_MS = 25_000
"""For one statement. Below the 30 s after which Flower's own clients take an answer for lost."""


class WaitForLock(CreateEnginePlugin):
    """SQLAlchemy plugin that sets the waiting time whenever a connection is taken from the pool."""

    def update_url(self, url: URL) -> URL:
        """Return the URL unchanged: SQLAlchemy has removed the word that named the plugin."""
        return url

    def engine_created(self, engine: Engine) -> None:
        """Set the time later than Flower does, which sets its own when a connection is made."""
        event.listen(engine, "checkout", _wait)


def _wait(connection: Any, *_: object) -> None:
    connection.execute(f"PRAGMA busy_timeout = {WAIT_MS}")
