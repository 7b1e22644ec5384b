"""What the name of an image file says: subject, session, stream, split, and whether it is a mask.

Names of the Brain Imaging Data Structure (BIDS 1.10, https://bids-specification.readthedocs.io) are read by its rules:

    sub-<label>/[ses-<label>/]<folder>/sub-<label>[_ses-<label>][_<key>-<value>...]_<suffix>.nii.gz

Others are read by their words, those of the folders around them included: an organ and a modality make the stream, the
name of a sequence its suffix, and what is left of the file's name is the subject (`liver/P07_CT.nii.gz`: subject P07
with liver-ct). A name that leaves something open is left out with the reason; patterns given by the user decide before.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import PurePath

from panfm.anatomy import DEFAULT_ORGANS, Modality

ORGANS = frozenset(
    {*DEFAULT_ORGANS, "abdomen", "bladder", "breast", "chest", "colon", "eye", "head", "hip", "hippocampus", "knee"}
    | {"lung", "pelvis", "prostate", "skin", "spine", "stomach", "thyroid"}
)
"""Words that are read as an organ; any other needs a pattern."""
MODALITIES = {str(modality): modality for modality in Modality} | {
    "mri": Modality.MR, "us": Modality.ULTRASOUND, "xr": Modality.XRAY, "dx": Modality.XRAY
}  # fmt: skip
"""Words that are read as a modality."""
SEQUENCES = {
    "t1": "t1", "t1w": "t1", "t2": "t2", "t2w": "t2", "flair": "flair", "pd": "pd", "pdw": "pd", "t1c": "t1c",
    "t1ce": "t1c", "t1gd": "t1c", "t2starw": "t2star", "angio": "angio", "unit1": "unit1", "swi": "swi", "adc": "adc",
}  # fmt: skip
"""Words that are read as a sequence of MR -> suffix of the stream."""
MASKS = frozenset({"mask", "masks", "seg", "segmentation", "segmentations", "dseg", "label", "labels", "labelstr"})
SPLITS = {"train": "train", "training": "train", "val": "val", "validation": "val", "test": "test", "testing": "test"}
"""Names of folders that are read as a split."""
_BIDS_NAME = re.compile(r"(sub-[A-Za-z0-9]+)(?:_(ses-[A-Za-z0-9]+))?(?:_[a-z]+-[A-Za-z0-9+]+)*_([A-Za-z0-9]+)")
_BIDS_STREAMS = {"ct": "brain-ct", "pet": "brain-pet"} | {
    suffix: f"brain-mr.{SEQUENCES[suffix.lower()]}"
    for suffix in ("T1w", "T2w", "FLAIR", "PDw", "T2starw", "angio", "UNIT1")
}
_IMAGE_SUFFIX = re.compile(r"(\.nii|\.[a-z0-9]{1,4})?(\.gz)?$", re.IGNORECASE)
_PERSON = re.compile(r"(?:^|[/_])(sub-[A-Za-z0-9]+)(?=[/_.]|$)")
_SESSION = re.compile(r"(?:^|[/_])(ses-[A-Za-z0-9]+)(?=[/_.]|$)")


class UnclearNameError(Exception):
    """A name that does not tell enough; the text says what is missing, and what to write."""


@dataclass(frozen=True)
class NameRules:
    """What the user says of names, before they are read."""

    patterns: Mapping[str, str]
    """Pattern of the shell -> stream, compared with the file's path below the folder, and its name with and without
    ending."""
    subject: re.Pattern[str] | None = None
    """Finds the subject in the path: its first group, or all of it."""


@dataclass(frozen=True)
class NamedImage:
    """Subject, stream, session and split of an image, read from its file name and folders."""

    subject: str
    stream: str
    session: str = ""
    split: str = ""


def read_name(path: PurePath, rules: NameRules) -> NamedImage:
    """Read the path of an image below the folder that is looked through.

    Raises:
        UnclearNameError: no stream or no subject, or two patterns that name different streams.
    """
    bids = _BIDS_NAME.fullmatch(stem(path))
    stream = _by_pattern(path, rules.patterns) if rules.patterns else _by_words(path, bids)
    session = _SESSION.search(path.as_posix())
    split = next((SPLITS[part.lower()] for part in path.parts[:-1] if part.lower() in SPLITS), "")
    return NamedImage(_subject(path, rules.subject), stream, session[1] if session else "", split)


def stem(path: PurePath) -> str:
    """The file's name without its ending, .nii.gz as a whole."""
    return _IMAGE_SUFFIX.sub("", path.name)


def image_of_mask(path: PurePath) -> tuple[str, str] | None:
    """Folder and stem of the image that a mask is named after; the folder is empty where the masks have one of their
    own. None for a file that is no mask by its name.
    """
    parts = re.split(r"[_.-]", stem(path))
    if parts[-1].lower() in MASKS:
        return path.parent.as_posix(), stem(path)[: -len(parts[-1]) - 1]
    return ("", stem(path)) if path.parent.name.lower() in MASKS else None


def _by_pattern(path: PurePath, patterns: Mapping[str, str]) -> str:
    texts = (path.as_posix(), path.name, stem(path))
    streams = {stream for pattern, stream in patterns.items() if any(fnmatchcase(text, pattern) for text in texts)}
    if len(streams) > 1:
        raise UnclearNameError(f"matches --stream of {' and '.join(sorted(streams))}, expected one")
    if not streams:
        raise UnclearNameError("matches no --stream")
    return streams.pop()


def _by_words(path: PurePath, bids: re.Match[str] | None) -> str:
    if bids and bids[3] in _BIDS_STREAMS:
        return _BIDS_STREAMS[bids[3]]
    if bids:
        raise UnclearNameError(
            f"suffix {bids[3]} of BIDS, which is no anatomical image known here; --stream takes it anyway"
        )
    words = _words(path.parent.as_posix()) + _words(stem(path))
    organ = next((word for word in reversed(words) if word in ORGANS), None)
    modality = next((MODALITIES[word] for word in reversed(words) if word in MODALITIES), None)
    sequence = next((SEQUENCES[word] for word in reversed(words) if word in SEQUENCES), None)
    if modality is None and sequence:
        modality = Modality.MR
    if modality in (Modality.FUNDUS, Modality.OCT):
        organ = organ or "eye"
    if organ is None or modality is None:
        missing = " and no ".join(name for name, word in (("organ", organ), ("modality", modality)) if word is None)
        stream = f"{organ or 'ORGAN'}-{modality or 'MODALITY'}"
        raise UnclearNameError(f"no {missing} in the path; write --stream {stream}='PATTERN'")
    return f"{organ}-{modality}.{sequence}" if sequence and modality is Modality.MR else f"{organ}-{modality}"


def _subject(path: PurePath, pattern: re.Pattern[str] | None) -> str:
    if pattern:
        match = pattern.search(path.as_posix())
        if not match or not (subject := match[pattern.groups and 1]):
            raise UnclearNameError("no match of --subject")
        return subject
    if person := _PERSON.search(path.as_posix()):
        return person[1]
    own = _without_words(stem(path))
    if not re.search(r"\d", own):  # "scan.nii.gz", "left.png": the folder tells the patients apart
        folders = (_without_words(part) for part in reversed(path.parts[:-1]))
        own = next((folder for folder in folders if folder), own)
    if not own:
        raise UnclearNameError("no subject in the path; write --subject 'EXPRESSION' that finds it in the path")
    return own


def _without_words(name: str) -> str:
    """A name less the parts that are nothing but organ, modality, sequence or split."""
    known = ORGANS | MODALITIES.keys() | SEQUENCES.keys() | MASKS | SPLITS.keys() | {"image", "images", "imagestr"}
    every = [part for part in re.split(r"[_\s.]+", name) if part]
    parts = [part for part in every if not known.issuperset(_words(part))]
    own = [part for part in parts if not _SESSION.fullmatch(part)]
    return "_".join(own) if len(own) < len(every) else name


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower())
