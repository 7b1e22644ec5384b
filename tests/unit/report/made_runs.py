"""Writes run folders like those of real runs, for tests of the report."""

import base64
import io
import json
import math

from PIL import Image

from panfm.config import RunConfig, StreamConfig, dump_toml
from panfm.evaluate.result import Leakage, ProbeResult, Score, write_result
from panfm.report.report_data import (
    Cost,
    EmbeddingMap,
    Example,
    Examples,
    ExpertMap,
    ExpertRow,
    ReportData,
    write_report_data,
)

STREAM = StreamConfig(shape=(4, 4, 4), patch=(2, 2, 2), spacing_mm=(1.0, 1.0, 1.0))
ORGANS = ("brain", "heart", "liver", "kidney", "pancreas")
STREAMS = tuple(f"{organ}-mr" for organ in ORGANS)
LEAKAGE = (("presence", "variance", 0.0), ("presence", "auc", 0.5), ("site", "accuracy", 0.2))
LONG = [f"hospital-of-saint-{name}-in-the-valley-of-the-long-names" for name in "abcdefghijkl"]


def make_run(folder, sites, *, label="diabetes", rounds=6, hostile="", **changes):
    """A finished run with all parts of a report.

    Args:
        hostile: Words that stand wherever a site or a label table may bring words of its own.
    """
    run = RunConfig.model_validate(
        {"name": "made", "streams": {name: STREAM.model_dump(by_alias=True) for name in STREAMS}} | changes
    )
    folder.mkdir(exist_ok=True)
    (folder / "run.toml").write_text(dump_toml(run))
    lines = [round_line(number, sites, hostile) for number in range(1, rounds + 1)]
    (folder / "rounds.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    held = {
        site: {"subjects": 40 + at, "streams": dict.fromkeys(STREAMS[: at % 5 + 1], 30)}
        for at, site in enumerate(sites)
    }
    (folder / "sites.json").write_text(
        json.dumps({"sites": held, "failed": [f"node 9: {hostile or 'an old version'}"]})
    )
    (folder / "model").mkdir(exist_ok=True)
    (folder / "model" / "metadata.json").write_text(json.dumps({"run-id": "made-1234", "rounds": rounds}))
    write_result(folder / "probe.json", probe(sites, [label, "stroke"], hostile))
    write_report_data(folder, report_data(sites, label))
    return folder


def round_line(number, sites, hostile):
    return {
        "round": number,
        "asked": list(sites),
        "seconds": 2.0 + number,
        "loss": 1.0 / number,
        "sites": {
            site: {
                "seconds": 1.0 + at,
                "loss": 1.0 / number + 0.01 * at,
                "validation_loss": 1.1 / number,
                "saliency": dict.fromkeys(STREAMS, 0.5 + 0.1 * at + 0.02 * number),
                "monitors": {"effective-rank": 20.0 - at, "feature-deviation": 0.4, "saliency-entropy": 0.9},
                "norms": {"backbone": 0.3, "head": 0.4},
                "bytes_down": 2_000_000,
                "bytes_up": 1_000_000 + 1000 * at,
            }
            for at, site in enumerate(sites)
        },
        "faults": {hostile or sites[0]: {"effective-rank": hostile or f"features collapse at {sites[0]}"}},
        "late": [],
        "rejected": {hostile or sites[0]: hostile or "update holds NaN"},
        "away": {f"node {hostile}": hostile or "offline"},
        "profile": dict.fromkeys(STREAMS, 0.8 + 0.05 * number),
        "epsilon": {},
        "bytes_up": {"backbone": 2_000_000, hostile or "head": 1_000_000},
        "bytes_down": {"backbone": 4_000_000},
    }


def probe(sites, labels, hostile=""):
    arms = {"federated": 0.71, **{f"site:{site}": 0.6 + 0.004 * at for at, site in enumerate(sites)}}
    arms |= {"start": 0.62, "untrained": 0.55, "statistics": 0.58, "tokenizer": math.nan}
    grid = {f"auc_missing_{count}": 0.7 - 0.03 * count for count in range(1, 5)}
    grid |= {f"auc_drop_{organ}": 0.01 * at for at, organ in enumerate(ORGANS)}
    return ProbeResult(
        scores=tuple(Score(arm, "all", "auc", auc, auc - 0.04, auc + 0.04, 2) for arm, auc in arms.items()),
        missing={arm: {"auc": auc, "auc_no_dominant": auc - 0.1, **grid} for arm, auc in list(arms.items())[:2]},
        balance={},
        subjects={"fit": 90, "test": 30},
        notes=(hostile,) if hostile else (),
        few_labels={arm: {"auc_50": auc - 0.05} for arm, auc in arms.items()},
        labels=tuple(
            Score(arm, label, "auc", auc, auc - 0.1, auc + 0.1, 1) for label in labels for arm, auc in arms.items()
        ),
        known={label: {"fit": 90, "test": 30} for label in labels},
        leakage=tuple(
            Leakage(arm, kind, metric, 0.3, 0.2, 0.4, chance)
            for kind, metric, chance in LEAKAGE
            for arm in ("federated", "start", "untrained")
        ),
        unmatched={sites[0]: {"without_row": 2, "without_images": 1}},
    )


def report_data(sites, label):
    count, picture = 60, png()
    places = [(math.cos(at), math.sin(2 * at)) for at in range(count)]
    return ReportData(
        EmbeddingMap(
            places,
            (0.4, 0.2),
            places[::-1],
            [sites[at % len(sites)] for at in range(count)],
            [", ".join(ORGANS[: at % 5 + 1]) for at in range(count)],
            {label: [None if at % 7 == 0 else at % 2 for at in range(count)]},
        ),
        Examples([Example(stream, picture, picture, picture) for stream in STREAMS], 0.6, 90, {STREAMS[0]: (0.8, 1.0)}),
        ExpertMap("backbone.blocks.1.mlp", [ExpertRow(site, STREAMS[0], [0.5, 0.25, 0.25, 0.0]) for site in sites]),
        Cost(5400.0, None),
    )


def png():
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), (90, 120, 30)).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()
