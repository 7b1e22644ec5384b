"""Organs, modalities and streams: the names that all other parts use.

A stream is one organ in one modality, written `<organ>-<modality>`: `brain-mr`, `chest-xray`. It is the unit that a
site has or lacks, that a tokenizer reads and that masking balances. Organs are configuration: any lower-case name does.
Several kinds of image of one organ and modality are streams of their own by a suffix: `brain-mr.t1`, `brain-mr.flair`.
"""

import re
from enum import StrEnum

DEFAULT_ORGANS = ("brain", "heart", "adipose", "liver", "kidney", "spleen", "pancreas")
"""The seven organs of Pan-FM (arXiv 2605.07055)."""

_ORGAN = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")
_SUFFIX = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")


class Modality(StrEnum):
    """Imaging physics; decides the intensity rule."""

    MR = "mr"
    CT = "ct"
    PET = "pet"
    XRAY = "xray"
    ULTRASOUND = "ultrasound"
    FUNDUS = "fundus"
    OCT = "oct"
    PATHOLOGY = "pathology"
    ENDOSCOPY = "endoscopy"
    PHOTO = "photo"


def parse_stream(name: str) -> tuple[str, Modality]:
    """Split a stream name into organ and modality; a suffix is left out.

    Raises:
        ValueError: the name is not `<organ>-<modality>` or `<organ>-<modality>.<suffix>` with a known modality.
    """
    plain, dot, suffix = name.partition(".")
    organ, _, modality = plain.rpartition("-")
    has_sound_suffix = not dot or _SUFFIX.fullmatch(suffix)
    if modality not in Modality.__members__.values() or not _ORGAN.fullmatch(organ) or not has_sound_suffix:
        expected = "<organ>-<modality> in lower case, or with a suffix as in brain-mr.t1"
        raise ValueError(f"stream {name!r}: expected {expected}, modality one of {', '.join(Modality)}")
    return organ, Modality(modality)


def module_name(stream: str) -> str:
    """Name of a stream's module in a model, whose paths are cut at dots: `brain-mr_t1` for `brain-mr.t1`.

    Guarantees:
        distinct: no stream name has an underscore, so two streams never share a module name.
    """
    return stream.replace(".", "_")


def stream_of_module(name: str) -> str:
    """The stream of a module name."""
    return name.replace("_", ".")
