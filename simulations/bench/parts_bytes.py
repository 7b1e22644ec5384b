"""Bytes that a site sends in a round, by the part of the model that is trained.

Counted from the layout of the groups, as float32: what the site sends up is also what it receives, but for the frozen
part, which it receives once. The model is a ViT-S of 14 x 14 patches as DINOv2 has it, with one stream of pictures.
Heads of the objective are trained in every part; with `sharing.head = "private"` they stay at the site.
"""

from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from panfm.config import parse_run
from panfm.models import describe_model
from panfm.models.packing import frozen_manifest, trained_manifest
from simulations.harness import bench
from simulations.study_result import StudyResult

_RUN = """
name = "bytes"
organs = ["eye"]
[streams]
eye-fundus = { shape = [112, 112], patch = [14, 14], channels = 3 }
[model]
size = "small"
tokenizer = "patch"
positions = "learned"
layer-scale = true
"""
PARTS = {
    "all": 'kind = "all"',
    "last-blocks 2": 'kind = "last-blocks", blocks = 2',
    "attention-projections 4": 'kind = "attention-projections", blocks = 4',
    "norms": 'kind = "norms"',
    "vectors": 'kind = "vectors"',
    "lora r8, 2 blocks": 'kind = "lora", rank = 8, blocks = 2',
    "lora r8, 2 blocks, frozen A": 'kind = "lora", rank = 8, blocks = 2, frozen-a = true',
    "lora r8, 12 blocks": 'kind = "lora", rank = 8, blocks = 12',
}
HEADS = ("private", "mean")


@bench
def main(
    objective: Annotated[str, typer.Option(help="Objective, whose heads count.")] = "latent",
) -> StudyResult:
    """Bytes of a round and site with every part of a ViT-S trained, with heads that stay and heads that travel."""
    result = StudyResult("parts-bytes", {"objective": objective}, unit="bytes")
    for part, table in PARTS.items():
        for head in HEADS:
            result.add(part, round_bytes(table, head, objective))
    for part in PARTS:
        for head in HEADS:
            metric = f"{head}/up"
            result.ratios[f"{head}/{part}"] = result.mean(metric, part) / result.mean(metric, "all")
    _show(result)
    return result


def round_bytes(parts: str, head: str, objective: str = "latent") -> dict[str, float]:
    """Bytes that a site sends in a round, in all and by group, and those it receives once."""
    tables: dict[str, Any] = {"sharing": f'head = "{head}"', "objective": f'name = "{objective}"'}
    text = "".join(f"[{name}]\n{line}\n" for name, line in tables.items())
    run = parse_run(f"{_RUN}{text}[train]\nparts = {{ {parts} }}\n")
    model = describe_model(run)
    manifest, frozen = (layout(model, run.sharing) for layout in (trained_manifest, frozen_manifest))
    groups = {f"{head}/{group}": 4.0 * manifest.size(group) for group in manifest.groups}
    once = sum(4.0 * frozen.size(group) for group in frozen.groups)
    return groups | {f"{head}/up": sum(groups.values()), f"{head}/once": once}


def _show(result: StudyResult) -> None:
    table = Table("trained", "heads", "bytes up", "of all", "received once")
    for part in PARTS:
        for head in HEADS:
            up, once = result.mean(f"{head}/up", part), result.mean(f"{head}/once", part)
            table.add_row(part, head, f"{up:,.0f}", f"{result.ratios[f'{head}/{part}']:.2%}", f"{once:,.0f}")
    Console(soft_wrap=True, highlight=False).print(table)
