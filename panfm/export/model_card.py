"""The model card of a Hugging Face folder: use, sites, streams, privacy, saliency, probes, failures."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from panfm.evaluate.result import Score
from panfm.export.final_model import Source, sizes_text
from panfm.report.run_files import Run, read_run

_USE = {
    "panfm": """\
    import panfm
    model = panfm.load("FOLDER")
    model.embed({{"{first}": "scan.nii.gz"}})          # float32 [1, {embedding}]""",
    "transformers": """\
    from transformers import AutoModel
    model = AutoModel.from_pretrained("FOLDER")       # pixels in [0, 1], no other normalisation
    model(pixel_values=pixels).last_hidden_state[:, 0]   # CLS, float32 [B, {embedding}]""",
}
_TUNED = "\n\nIt was then fine-tuned for `{task}`, with labels or masks of {fine-tuned-on} training patients."
_TUNED_TOGETHER = "\n\nIts sites fine-tuned it together for `{task}`, with the labels of their training patients."
_CARD = """\
---
library_name: {library}
license: other
license_name: {licence}
tags: [medical-imaging, self-supervised, federated-learning]
---
# {name}

A {organs} model, pre-trained without labels by {num_sites} sites in {rounds} rounds of federated learning. No image
left its site.{tuned}

{use}

## Intended use

{intended-use}. Features for a probe or for fine-tuning on data of one's own, validated there before anything is
concluded.

## Training

| | |
|---|---|
| run | `{run-id}`, {rounds} rounds |
| sites | {sites} |
| privacy | {epsilon} |
| experts | {experts} |
| started from | {start} |
| SHA-256 of the run's weights | `{model-hash}` |

## Streams

| stream | shape | spacing in mm | intensity | sites | saliency |
|---|---|---|---|---|---|
{streams}

Saliency is the share of attention in the last round, relative to an equal split: 1 is a stream's fair share.

## Probes

{probes}

## Failures and limits

{failures}
"""


def model_card(source: Source, metadata: Mapping[str, Any], library: str) -> str:
    """Text of the card, in Markdown.

    Args:
        metadata: Of the export.
        library: `panfm` or `transformers`, whichever loads it.
    Raises:
        ConfigError, DataError: a file of the run folder around the model does not hold.
    """
    run = _run_of(source)
    first = next(iter(metadata["streams"]))
    words = {
        "library": library,
        "organs": ", ".join(dict.fromkeys(stream["organ"] for stream in metadata["streams"].values())),
        "num_sites": len(metadata["sites"]),
        "tuned": _tuned(metadata),
        "use": _USE[library].format(first=first, embedding=metadata["embedding"]),
        "sites": ", ".join(metadata["sites"]),
        "start": f"weights of SHA-256 `{metadata['start']}`" if metadata["start"] else "parameters drawn at random",
        "streams": "\n".join(_stream_rows(metadata["streams"], run)),
        "probes": "\n".join(_probe_lines(run)),
        "failures": "\n".join(f"* {line}" for line in _failures(run)),
    }
    return _CARD.format(**dict(metadata) | words)


def _run_of(source: Source) -> Run | None:
    """The run folder around a model; None where the model lies alone."""
    folder = source.folder.parent
    return read_run(folder) if (folder / "rounds.jsonl").exists() else None


def _tuned(metadata: Mapping[str, Any]) -> str:
    """Write a sentence on the task of a model that was fine-tuned; empty for any other."""
    if "task" not in metadata:
        return ""
    return (_TUNED if metadata["fine-tuned-on"] is not None else _TUNED_TOGETHER).format(**metadata)


def _stream_rows(streams: Mapping[str, Mapping[str, Any]], run: Run | None) -> Iterator[str]:
    profile = (run.rounds[-1].get("profile") or {}) if run and run.rounds else {}
    for name, stream in streams.items():
        sites = sum(name in holdings.get("streams", {}) for holdings in run.sites.values()) if run else 0
        saliency = profile.get(name)
        cells = (
            f"`{name}`",
            sizes_text(stream["shape"]),
            sizes_text(stream.get("spacing-mm", [])),
            stream["intensity"],
            str(sites or "not told"),
            "not told" if saliency is None else f"{saliency:.2f}",
        )
        yield f"| {' | '.join(cells)} |"


def _probe_lines(run: Run | None) -> Iterator[str]:
    if run is None or run.probe is None or not run.probe.scores:
        yield "The run was not probed: nothing is known of what its features tell."
        return
    subjects = run.probe.subjects.get("test")
    yield f"Linear probes of frozen features on {subjects or 'the'} held-out subjects, with 95 % bootstrap intervals.\n"
    yield "| features | labels | metric | value |"
    yield "|---|---|---|---|"
    for score in run.probe.scores:
        yield f"| {score.arm} | {score.group} | {score.metric} | {_interval(score)} |"
    yield from (f"\n{note}" for note in run.probe.notes)


def _failures(run: Run | None) -> Iterator[str]:
    if run is not None:
        yield from (f"not part of the run: {line}" for line in run.left_out)
        refused = Counter(site for line in run.rounds for site in line.get("rejected", {}))
        yield from (f"{site}: left out of {count} of {len(run.rounds)} rounds" for site, count in refused.items())
    yield "not tried on images of other sites, scanners or patients than those above; not a medical device"
    yield "an embedding may tell of the site, the scanner, and which images a patient has"


def _interval(score: Score) -> str:
    if math.isnan(score.low) or math.isnan(score.high):
        return f"{score.value:.3f}"
    return f"{score.value:.3f} [{score.low:.3f}, {score.high:.3f}]"
