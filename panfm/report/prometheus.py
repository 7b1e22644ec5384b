"""Writes samples in Prometheus' text format."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from panfm.errors import DataError, reason
from panfm.files import open_atomic

Metrics = Mapping[str, tuple[str, str]]
"""Name -> kind, and meaning with its unit."""
Sample = tuple[str, Mapping[str, str], float]
"""Name, labels, value."""


def prometheus_text(metrics: Metrics, samples: Iterable[Sample], labels: Mapping[str, str]) -> str:
    """Write samples, those of one metric together.

    Args:
        labels: Of all samples.
    """
    lines: dict[str, list[str]] = {}
    for name, own, value in samples:
        words = ",".join(f'{label}="{escaped(text)}"' for label, text in {**labels, **own}.items())
        lines.setdefault(name, []).append(f"{name}{{{words}}} {value:.17g}\n")
    text = ""
    for name, told in lines.items():
        kind, meaning = metrics[name]
        text += f"# HELP {name} {meaning}\n# TYPE {name} {kind}\n{''.join(told)}"
    return text


def escaped(text: str) -> str:
    """Text of a label's value: backslash, quote and end of line escaped, and no half of a character."""
    text = text.encode("utf-8", "replace").decode()
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def write_metrics(path: Path, text: str) -> None:
    """Write a whole file that other accounts may read, as node-exporter has to.

    Raises:
        DataError: it cannot be written.
    """
    try:
        with open_atomic(path) as file:
            os.fchmod(file.fileno(), 0o644)  # whatever the umask
            file.write(text.encode())
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({reason(error)})") from error
