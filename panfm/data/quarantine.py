"""Writes `quarantine.csv`, the rows of a manifest that are left out of every run, each with the reason."""

import csv
import io
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from panfm.config import load_site
from panfm.data.left_out import LISTED, content_of, numbered
from panfm.data.manifest import QUARANTINE, Fault, image_path, parse_manifest
from panfm.errors import DataError, reason
from panfm.files import write_atomic


def write_quarantine(folder: Path, faults: Sequence[Fault]) -> Path:
    """Write the list of rows that have a fault; every run leaves them out until the list is written anew.

    Raises:
        DataError: the file cannot be written.
    """
    site, text = load_site(folder), io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(LISTED)
    keys = dict(numbered(parse_manifest(folder, site)))
    images = Counter(key[:2] for key in keys.values())
    for fault in faults:
        if row := fault.row:
            key = keys.get(row, ("", "", "", 1))
            is_only = row.path and images[key[:2]] == 1  # else another row's image might be taken for it
            voxels = content_of(image_path(folder, site, row.path)) if is_only else ""
            told = f"found {fault.given}, expected {fault.expected}"
            table.writerow((row.subject, row.stream, row.path, key[-1], voxels, told))
    path = folder / QUARANTINE
    try:
        write_atomic(path, text.getvalue().encode())
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({reason(error)}), expected a writable site folder") from error
    return path
