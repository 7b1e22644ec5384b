"""A SuperLink's database for outages and busy disks: `--database "sqlite:////path/superlink.db?plugin=panfm"`.

Flower lets a statement wait five seconds. While a disk is busy for longer, with a large reply or somebody's checkpoint,
its SuperLink then answers with a server error, and every process that gets it ends: SuperNodes, the SuperExec, and with
it the run. Here a statement waits longer.

Flower ends a run whose ServerApp has not been heard of for a minute, and answers a message to a SuperNode that has not,
with an error. A SuperLink that was down for a minute hears of nobody, so it would end all runs as it starts. Here both
have another minute from its start. (Read in Flower 1.41: tables `task` and `node`, flwr/supercore/state/schema.)

It lies here, and not in `server`, because a SuperLink runs where the wheel is, which holds `panfm` alone.
"""

import logging
import sqlite3
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import URL, event
from sqlalchemy.engine import CreateEnginePlugin, Engine

logger = logging.getLogger(__name__)
WAIT_MS = 25_000
"""For one statement. Below the 30 s after which Flower's own clients take an answer for lost."""
GRACE_S = 60.0
"""From the start of the SuperLink. Its clients try again at least every 20 s."""


class WaitForLock(CreateEnginePlugin):
    """SQLAlchemy plugin: sets the waiting time whenever a connection is taken from the pool, and extends once, as the
    process starts, what Flower took for alive before."""

    has_extended = False

    def update_url(self, url: URL) -> URL:
        """Return the URL unchanged: SQLAlchemy has removed the word that named the plugin."""
        return url

    def engine_created(self, engine: Engine) -> None:
        """Set the time later than Flower does, which sets its own when a connection is made."""
        event.listen(engine, "checkout", _wait)
        event.listen(engine, "connect", _extend_once)


def _wait(connection: Any, *_: object) -> None:
    connection.execute(f"PRAGMA busy_timeout = {WAIT_MS}")


def _extend_once(connection: Any, *_: object) -> None:
    if not WaitForLock.has_extended:
        WaitForLock.has_extended = True
        connection.execute(f"PRAGMA busy_timeout = {WAIT_MS}")
        extend_claims(connection)


def extend_claims(connection: sqlite3.Connection) -> None:
    """Give the tasks and nodes of a database that were alive when its SuperLink ended another minute from now."""
    until = datetime.now(UTC) + timedelta(seconds=GRACE_S)
    try:
        with connection:
            connection.execute(
                "UPDATE task SET active_until = ? WHERE token IS NOT NULL AND finished_at IS NULL AND active_until < ?",
                2 * (until.isoformat(sep=" "),),
            )
            connection.execute(
                "UPDATE node SET online_until = ? WHERE status = 'online' AND online_until < ?",
                2 * (until.timestamp(),),
            )
    except sqlite3.OperationalError as error:
        logger.info("no runs or nodes to go on with (%s)", error)  # a new database
