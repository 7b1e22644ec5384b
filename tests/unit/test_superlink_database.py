import sqlite3
import threading
import time
from pathlib import Path

import pytest
from flwr.supercore.object_store.sql_object_store import SqlObjectStore
from sqlalchemy import text
from sqlalchemy.exc import OperationalError

from panfm.superlink_database import WAIT_MS

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
