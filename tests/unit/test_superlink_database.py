import sqlite3
import threading
import time
from pathlib import Path

import pytest
from flwr.server.superlink.linkstate.sql_linkstate import SqlLinkState
from flwr.supercore.object_store.sql_object_store import SqlObjectStore
from flwr.superlink.federation.noop_federation_manager import NoOpFederationManager
from sqlalchemy import text
from sqlalchemy.exc import OperationalError

from panfm.superlink_database import WAIT_MS, extend_claims

pytestmark = pytest.mark.filterwarnings("ignore:No path_separator:DeprecationWarning")  # Alembic to Flower


def store(path: Path, query: str) -> SqlObjectStore:
    """What keeps the arrays on a SuperLink's disk."""
    found = SqlObjectStore(f"sqlite:///{path}{query}")
    found.initialize()
    return found


@pytest.mark.parametrize(("query", "milliseconds"), [("", 5000), ("?plugin=panfm", WAIT_MS)])
def test_flower_waits_as_long_as_the_url_says(tmp_path, query, milliseconds):
    """Also on a connection that the pool gives out again."""
    objects = store(tmp_path / "superlink.db", query)
    for _ in range(2):
        with objects.session() as session:
            assert session.scalar(text("PRAGMA busy_timeout")) == milliseconds
    objects._engine.dispose()


@pytest.mark.slow
@pytest.mark.parametrize("query", ["", "?plugin=panfm"])
def test_a_lock_of_seven_seconds(tmp_path, query):
    objects = store(tmp_path / "superlink.db", query)
    other = sqlite3.connect(tmp_path / "superlink.db", isolation_level=None, check_same_thread=False)
    other.execute("BEGIN IMMEDIATE")
    timer = threading.Timer(7.0, other.rollback)
    timer.start()
    begin = time.monotonic()
    if query:
        objects.clear()
        assert time.monotonic() - begin > 6.0
    else:
        with pytest.raises(OperationalError, match="database is locked"):
            objects.clear()
    timer.join()
    other.close()
    objects._engine.dispose()


def test_a_superlink_that_starts_again_gives_what_was_alive_another_minute(tmp_path):
    """By the tables of a real SuperLink; what had ended or gone offline before stays so."""
    links = SqlLinkState(
        f"sqlite:///{tmp_path / 'superlink.db'}", NoOpFederationManager(), store(tmp_path / "objects.db", "")
    )
    links.initialize()
    before, connection = "2026-01-01 00:00:00+00:00", sqlite3.connect(tmp_path / "superlink.db")
    tasks = [(1, "token", None), (2, "other", before), (3, None, None)]
    for task_id, token, finished in tasks:
        words = (task_id, "serverapp", 1, token, before, before, finished)
        connection.execute(
            "INSERT INTO task (task_id, type, run_id, token, active_until, pending_at, finished_at) "
            "VALUES (?, ?, ?, ?, ?, ?, ?)",
            words,
        )
    connection.executemany(
        "INSERT INTO node (node_id, status, online_until) VALUES (?, ?, 1.0)", [(1, "online"), (2, "offline")]
    )
    connection.commit()
    extend_claims(connection)
    alive = connection.execute("SELECT task_id FROM task WHERE active_until > ? ORDER BY task_id", (before,)).fetchall()
    online = connection.execute("SELECT node_id FROM node WHERE online_until > ?", (time.time() + 50,)).fetchall()
    assert (alive, online) == ([(1,)], [(1,)])
    extend_claims(sqlite3.connect(":memory:"))  # a new one
    connection.close()
    links._engine.dispose()
