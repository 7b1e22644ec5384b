"""Settings under which Flower and Ray talk to nobody and install nothing. Applied before they are imported."""

import os
import tempfile
from pathlib import Path

OFFLINE = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


def go_offline() -> None:
    """Set them in this process and for its children, with a home of Flower's own instead of ~/.flwr."""
    os.environ.update(OFFLINE)
    os.environ.setdefault("FLWR_HOME", str(Path(tempfile.gettempdir(), f"panfm-flower-{os.getpid()}")))
