"""Organs, modalities and streams: the vocabulary every other part speaks.

A stream is one organ in one modality, written `<organ>-<modality>`: `brain-mr`, `chest-xray`. It is the unit that a
site has or lacks, that a tokenizer reads and that masking balances. Organs are configuration: any lower-case name does.
"""

import re
from enum import StrEnum

DEFAULT_ORGANS = ("brain", "heart", "adipose", "liver", "kidney", "spleen", "pancreas")
"""The seven organs of Pan-FM (arXiv 2605.07055)."""

_ORGAN = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")


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
    """Split a stream name into organ and modality.

    Raises:
        ValueError: the name is not `<organ>-<modality>` with a known modality.
    """
    organ, _, modality = name.rpartition("-")
    if modality not in Modality.__members__.values() or not _ORGAN.fullmatch(organ):
        known = ", ".join(Modality)
        raise ValueError(f"stream {name!r}: expected <organ>-<modality> in lower case, modality one of {known}")
    return organ, Modality(modality)
