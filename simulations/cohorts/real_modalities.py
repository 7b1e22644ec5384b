"""Sites made from the real pictures of six modalities, read in place from the folder that $PANFM_REAL_DATA names.

A site has the training pictures of its modalities; the holdout folder has the test pictures of all, and the training
pictures of the modalities that no site has. The split is the data's own, by patient where patients are known. Each
picture is one subject of the manifest, though three people make up all of PET: a subject has one picture per stream.

Labels are the classes of a modality that has several, e.g. `xray-hand`; they are unknown in the other modalities.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from panfm.anatomy import parse_stream
from panfm.config.base import Name
from panfm.data.tables import read_table
from panfm.errors import ConfigError, DataError
from panfm.outputs import new_folder
from simulations.cohorts.cohort_source import Progress, StreamCohort, Streams, StreamSiteConfig, listing_of, texts_of
from simulations.cohorts.real_images import real_data
from simulations.cohorts.site_folder import write_site_folder

FOLDER = "modality2d"
Picture = Mapping[str, str]
"""A line of the data's manifest: file, split, modality, class, ..."""


class RealModalitiesCohort(StreamCohort):
    """The real pictures of six modalities under $PANFM_REAL_DATA, each modality at one place."""

    kind: Literal["real-modalities"]
    sites: Annotated[dict[Name, StreamSiteConfig], Field(min_length=1)]
    """Name of a site -> its patients and streams."""
    with_weights: Annotated[tuple[str, ...], Field(strict=False)] = ()
    """Changes of the run, as `--set` takes them, with which it starts from the weights that $PANFM_WEIGHTS names."""

    @model_validator(mode="after")
    def _modalities_are_disjoint(self) -> Self:
        streams = [stream for site in self.sites.values() for stream in site.streams] + list(self.held_out)
        modalities = [parse_stream(stream)[1].value for stream in streams]
        if twice := [modality for modality in modalities if modalities.count(modality) > 1]:
            raise ValueError(f"sites: modality {twice[0]!r} stands at two places, expected one")
        return self

    def write(self, folder: Path, streams: Streams, progress: Progress = lambda *_: None) -> None:
        """Write site folders that point to the real pictures; no image is copied. Raises as every cohort, or
        ConfigError: a stream is not of pictures that are there.

        `progress` is told how many places are written.
        """
        source = real_data(FOLDER) / FOLDER
        pictures = read_pictures(source)
        _check(self, streams, pictures)
        labels = class_labels(pictures)
        places = {f"sites/{name}": [(stream, "train") for stream in site.streams] for name, site in self.sites.items()}
        places["holdout"] = [(stream, "train") for stream in self.held_out]
        places["holdout"] += [(stream, "test") for stream in self.named_streams]
        with new_folder(folder) as partial:
            for done, (place, parts) in enumerate(places.items(), start=1):
                there = [(stream, picture) for stream, split in parts for picture in _of(pictures, stream, split)]
                rows = [(_name(one), stream, source / one["file"], one["split"]) for stream, one in there]
                answers = [(_name(one), *_answers(one, labels)) for _, one in there]
                write_site_folder(partial / place, rows, tuple(labels), answers)
                progress(done, len(places))
            self.write_description(partial, labels={name: {"kind": "class"} for name in labels})

    def fingerprint(self) -> list[object]:
        """The code that shares the pictures out, and the list of the pictures."""
        return texts_of([Path(__file__)]) + listing_of(real_data(FOLDER) / FOLDER, "*")


def read_pictures(source: Path) -> list[Picture]:
    """Lines of the data's manifest. Raises DataError: it does not hold."""
    path = source / "manifest.csv"
    try:
        return [cells for _, cells in read_table(path, ("file", "split", "modality", "class"))[1]]
    except DataError as error:
        raise DataError(f"{path}: {error}") from error


def class_labels(pictures: Iterable[Picture]) -> dict[str, tuple[str, str]]:
    """Label -> (modality, class), for every class of a modality that has more than one."""
    known = sorted({(picture["modality"], picture["class"]) for picture in pictures})
    several = [pair for pair in known if sum(modality == pair[0] for modality, _ in known) > 1]
    return {f"{modality}-{kind.lower().replace('_', '-')}": (modality, kind) for modality, kind in several}


def _check(cohort: RealModalitiesCohort, streams: Streams, pictures: Sequence[Picture]) -> None:
    for stream in cohort.named_streams:
        if streams[stream].is_volume or not _of(pictures, stream, "train"):
            known = ", ".join(sorted({picture["modality"] for picture in pictures}))
            raise ConfigError(f"stream {stream}: expected pictures of one of {known}")


def _name(picture: Picture) -> str:
    """Name of the subject that a picture makes up."""
    return Path(picture["file"]).stem


def _of(pictures: Iterable[Picture], stream: str, split: str) -> list[Picture]:
    modality = parse_stream(stream)[1]
    return [picture for picture in pictures if (picture["modality"], picture["split"]) == (modality, split)]


def _answers(picture: Picture, labels: Mapping[str, tuple[str, str]]) -> list[str]:
    """1 or 0 where the label is of the picture's modality, nothing elsewhere."""
    return [
        str(int(kind == picture["class"])) if modality == picture["modality"] else ""
        for modality, kind in labels.values()
    ]
