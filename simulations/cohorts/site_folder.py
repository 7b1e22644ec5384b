"""Writes whole site folders, for programs that make cohorts."""

from collections.abc import Sequence
from pathlib import Path

from panfm.config import Releasable, SiteConfig, dump_toml
from panfm.config.site_description import LimitsConfig
from panfm.data.manifest import COLUMNS
from panfm.outputs import write_table

_SIMULATED = LimitsConfig(
    may_leave=tuple(Releasable), smallest_batch=1, smallest_steps=1, training_labels="all", evaluation_labels="all"
)
"""Limits of a simulated site. Its patients are synthetic or public, so everything may leave, with batches and steps of
any size. `constant_images` is "take" because one of the public pictures has a single grey level."""


def write_site_folder(
    folder: Path,
    rows: Sequence[Sequence[object]],
    label_names: Sequence[str] = (),
    labels: Sequence[Sequence[object]] = (),
) -> None:
    """Write `site.toml`, `manifest.csv` and, if there are labels, `labels.csv`; the site is named like the folder.

    Args:
        folder: Made if need be.
        rows: Of the manifest: subject, stream, path, split and optionally mask.
        label_names: Columns of the label table after `subject`.
        labels: Its rows: subject and one value per label; none, and there is no table.
    """
    folder.mkdir(parents=True, exist_ok=True)
    table = "labels.csv" if labels else None
    site = SiteConfig(name=folder.name, labels=table, constant_images="take", limits=_SIMULATED)
    (folder / "site.toml").write_text(dump_toml(site), encoding="utf-8")
    write_table(folder / "manifest.csv", COLUMNS[: len(rows[0])], rows)
    if labels:
        write_table(folder / "labels.csv", ("subject", *label_names), labels)
