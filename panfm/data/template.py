"""A new site folder to fill in, with a commented `site.toml`; and rows added to the manifest of one."""

import csv
import io
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import tomli_w

from panfm.config import SiteConfig, parse_site, site_path
from panfm.data.manifest import COLUMNS, Row, scan_manifest
from panfm.errors import DataError
from panfm.files import write_atomic

_SITE = """\
# One hospital. What is forbidden here stays forbidden, whatever a run asks for. The worker reads this file anew for
# every question; which experiments may run is decided with `panfm site requests`, `approve` and `reject`.

# Stable name, known to the coordinator: lower-case letters, digits, dot, dash, underscore.
name = "{name}"

# Table of images, relative to this file: {columns}
# One row per subject and stream (`<organ>-<modality>`, e.g. brain-mr; brain-mr.t1 where there are several); paths are
# absolute or relative to the table; split is train, val or test (train when empty); mask and session are optional.
manifest = "manifest.csv"

# Labels for probes, relative to this file: `subject` and one column per label. They never leave the site.
# labels = "labels.csv"

# Preprocessed images and private training state, relative to this file.
cache-dir = ".panfm/cache"
state-dir = ".panfm/state"
# Record of the privacy spent by all runs on these patients. Back it up; never delete it.
ledger-dir = ".panfm/ledger"

[limits]
# Kinds of content that may leave the site; updates and counts are needed to take part.
# "label-sums" besides: sums of features and labels, for a probe of all sites and for gates (docs/site-operator.md).
# "monitors" besides: numbers of a round's last batch that tell of a collapse (docs/site-operator.md).
# "input-sums" besides: sums of what tokenizers read, to centre and scale them alike everywhere (docs/site-operator.md).
may-leave = ["updates", "counts", "loss", "saliency"]
# Set these three to take part in differentially private runs only, and to spend at most this over all of them.
# epsilon = 8.0
# At most 1 / (10 public-subjects).
# delta = 1e-4
# Patients that the site is publicly known to have; stands for the true number in private runs.
# public-subjects = 1000
# Columns of the label table that a run with [task] may train on; "all": any. Such a run's updates tell of them.
training-labels = []
# Columns on which the model of a run may be evaluated; "all": any. Needs "evaluation" in may-leave. What leaves is the
# AUC or R2 of a column with its interval, and the number of patients (docs/site-operator.md). With "monitors" as well,
# rounds that validate tell the mean AUC of a probe of these labels on the val split, if the run names them.
evaluation-labels = []
# Fewest training subjects in a batch, behind a stream's or expert's update of a round, a loss or a saliency, and fewest
# local steps in a round, of a run that is not private; a private one then needs the epsilon above.
# docs/site-operator.md says what they do not stop.
smallest-batch = 8
smallest-steps = 5
# Unfinished runs that may ask for rounds; one that has asked for nothing for so many hours gives way.
runs-at-once = 1
idle-hours = 24.0
# A round, or a handshake, that takes longer is given up; one that fills more memory fails (if left out, a run may fill
# all of the machine's, and `panfm site start` says so).
seconds-per-round = 86_400.0
# memory-gib = 32.0

[worker]
# `panfm site start` answers here, and only to its own account and these ones (the one that Flower runs under).
socket = ".panfm/run/worker.sock"
users = []
# Group that may reach the socket, when Flower runs under another account.
# group = "panfm"

[coordinator]
# For the SuperNode's command, which `panfm site start` prints: where it dials, what it trusts, its own key.
address = "coordinator.example.org:443"
root-certificates = "ca.crt"
key = "supernode.key"
"""


def read_rows(folder: Path, site: SiteConfig) -> tuple[Row, ...]:
    """All rows of a manifest, faulty ones too; none if there is no manifest. Raises DataError: it is no table."""
    path = site_path(folder, site.manifest)
    if not path.exists() or not _lines(path)[1:]:
        return ()
    rows, faults = scan_manifest(folder, site)
    if whole := [fault for fault in faults if fault.row is None]:
        raise DataError(f"{folder}: {whole[0]}")
    return (*rows, *(fault.row for fault in faults if fault.row))


def add_rows(folder: Path, site: SiteConfig, rows: Sequence[Row]) -> None:
    """Add rows to a site's manifest, and the columns that they need.

    Guarantees:
        kept: rows that are there keep their line and cells.
    Raises:
        DataError: the manifest is no table, or cannot be written.
    """
    path = site_path(folder, site.manifest)
    lines = _lines(path) if path.exists() else []
    header, *before = lines or [list(COLUMNS[:4])]
    columns = [name.strip() for name in header]
    if "subject" not in columns:
        raise DataError(f"{path}: found {','.join(header)!r:.80}, expected a header with commas to add rows to")
    new = [name for name in COLUMNS if name not in columns and any(getattr(row, name) for row in rows)]
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow([*columns, *new])
    table.writerows([*cells, *("" for _ in new)] if cells else [] for cells in before)
    table.writerows([getattr(row, name) for name in [*columns, *new]] for row in rows)
    try:
        write_atomic(path, text.getvalue().encode())
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror}), expected a writable site folder") from error


def init_site(folder: Path, name: str) -> None:
    """Write `site.toml` and an empty `manifest.csv` into a folder, which is made if need be, for its owner alone.

    Raises:
        ConfigError: the name is not one.
        DataError: one of the files is there already, or cannot be written.
    """
    columns, text = ",".join(COLUMNS), site_text(name)
    files = {folder / "site.toml": text, folder / "manifest.csv": f"{columns}\n"}
    for path in files:
        if path.exists():
            raise DataError(f"{path}: found a file, expected none: it would be overwritten")
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for path, content in files.items():
            path.write_text(content, encoding="utf-8")
    except OSError as error:
        raise DataError(f"{folder}: cannot be written to ({error.strerror}), expected a folder") from error


def plain_name(text: str) -> str:
    """A name as sites and runs have it, made from any text: `South Clinic` becomes `south-clinic`; may be empty."""
    letters = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9._-]+", "-", letters).strip("-._")[:64]


def site_text(name: str, *, has_labels: bool = False) -> str:
    """The commented `site.toml` of a new site. Raises ConfigError: the name is not one."""
    parse_site(tomli_w.dumps({"name": name}), "--name")
    text = _SITE.format(name=name, columns=",".join(COLUMNS))
    return text.replace("# labels =", "labels =") if has_labels else text


def _lines(path: Path) -> list[list[str]]:
    """Cells of every line of a manifest, blank lines too. Raises DataError: it is no UTF-8 CSV file."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            return list(csv.reader(file, strict=True))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: no UTF-8 CSV file ({error})") from error
