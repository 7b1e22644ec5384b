"""A new site folder to fill in, with a commented `site.toml`."""

from pathlib import Path

import tomli_w

from panfm.config import parse_site
from panfm.data.manifest import COLUMNS
from panfm.errors import DataError

_SITE = """\
# One hospital. What is forbidden here stays forbidden, whatever a run asks for.

# Stable name, known to the coordinator: lower-case letters, digits, dot, dash, underscore.
name = "{name}"

# Table of images, relative to this file: {columns}
# One row per subject and stream (`<organ>-<modality>`, e.g. brain-mr); paths are relative to the table; split is train,
# val or test (train when empty); mask is optional.
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
may-leave = ["updates", "counts", "loss", "saliency"]
# Set these three to take part in differentially private runs only, and to spend at most this over all of them.
# epsilon = 8.0
# At most 1 / (10 public-subjects).
# delta = 1e-4
# Patients that the site is publicly known to have; stands for the true number in private runs.
# public-subjects = 1000
# Experiments that may run here, by the hash that `panfm site dry-run` prints; empty: any.
experiments = []
# Trained models that a run may start from ([start]), by the hash that a refusal names. A run that starts from another
# is refused, unless its experiment is named, smallest-batch is 1, or the run is private and epsilon is set.
starts = []
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


def init_site(folder: Path, name: str) -> None:
    """Write `site.toml` and an empty `manifest.csv` into a folder, which is made if need be, for its owner alone.

    Raises:
        ConfigError: the name is not one.
        DataError: one of the files is there already, or cannot be written.
    """
    parse_site(tomli_w.dumps({"name": name}), "--name")
    columns = ",".join(COLUMNS)
    text = _SITE.format(name=name, columns=columns)
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
