"""Settings under which Flower and Ray talk to nobody and install nothing. Applied before they are imported."""

import atexit
import os
import secrets
import shutil
import tempfile
from pathlib import Path

from server import flower_cli

OFFLINE = flower_cli.OFFLINE | {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}


def go_offline() -> None:
    """Set the environment of this process and its children, with a home for Flower instead of ~/.flwr."""
    os.environ.update(OFFLINE)
    if "FLWR_HOME" not in os.environ:
        os.environ["FLWR_HOME"] = home = str(Path(tempfile.gettempdir(), f"panfm-flower-{secrets.token_hex(8)}"))
        atexit.register(shutil.rmtree, home, ignore_errors=True)
