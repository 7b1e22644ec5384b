"""Proposes tasks for the probe of all sites' labels: labels that all sites have as numbers and allow to be summed."""

from collections.abc import Sequence
from pathlib import Path

from panfm.cells import plain_number
from panfm.config import Releasable, load_site
from panfm.data.joins import named
from panfm.data.label_kinds import LabelKind, infer_kinds, read_rules
from panfm.data.labels import LabelTable, read_site_cells

_MOST = 16
"""Greatest number of tasks that are proposed; users may add more by hand."""
_NO_PROBE = "no probe of all sites' labels is proposed"


def propose_tasks(folders: Sequence[Path]) -> tuple[dict[str, tuple[str, ...]], str]:
    """Propose one task for each label that all sites have as numbers.

    Returns:
        Tasks, and a line on what sites lack for more tasks; either may be empty.
    Raises:
        ConfigError, DataError: a site's label table, or its `labels.toml`, is not valid.
    """
    sites = [(folder, load_site(folder)) for folder in folders]
    if len(sites) < 2 or not any(site.labels for _, site in sites):
        return {}, ""
    if lacking := [site.name for _, site in sites if not site.labels]:
        return {}, f'{_NO_PROBE}: no labels = "labels.csv" in site.toml of {named(lacking)}'
    tables = [read_site_cells(folder, site) for folder, site in sites]
    kinds = infer_kinds(tables, read_rules(tables)).by_column
    shared = [name for name in kinds if all(name in table.cells for table in tables)]
    numbers = [name for name in shared if all(_is_of_numbers(table, name, kinds[name]) for table in tables)]
    if not numbers:
        return {}, f"{_NO_PROBE}: no label that all sites have as numbers, such as 0 and 1"
    if closed := [site.name for _, site in sites if Releasable.LABEL_SUMS not in site.limits.may_leave]:
        where = f'"label-sums" in limits.may-leave of site.toml of {named(closed)}'
        return {}, f"{_NO_PROBE}: {named(numbers)} could be probed with {where} (docs/site-operator.md)"
    return {name: (name,) for name in numbers[:_MOST]}, _left_out(numbers, shared)


def _left_out(numbers: Sequence[str], shared: Sequence[str]) -> str:
    """Write a line on labels that all sites have but that are not proposed; empty if there are none."""
    if len(numbers) > _MOST:
        return f"probe.tasks: the first {_MOST} of {len(numbers)} labels are proposed; name others by hand"
    rest = [name for name in shared if name not in numbers]
    return f"probe.tasks: {named(rest)} left out: not plain numbers at all sites" if rest else ""


def _is_of_numbers(table: LabelTable, name: str, kind: LabelKind) -> bool:
    """Whether a column can be summed as written: only numbers and empty cells, and no number means "not known"."""
    cells = [cell for cell in table.cells[name] if cell]
    return kind.kind in ("yes-no", "number") and all(
        plain_number(cell) is not None and cell not in kind.unknown for cell in cells
    )
