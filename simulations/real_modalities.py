"""Sites made from the real pictures of six modalities, read in place from the folder that $PANFM_REAL_DATA names.

A site has the training pictures of its modalities; the holdout folder has the test pictures of all, and the training
pictures of the modalities that no site has. The split is the data's own, by patient where patients are known. Each
picture is one subject of the manifest, though three people make up all of PET: a subject has one picture per stream.

Labels are the classes of a modality that has several, e.g. `xray-hand`; they are unknown in the other modalities.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import tomli_w

from panfm.anatomy import parse_stream
from panfm.config import StreamConfig
from panfm.config.cohort import RealModalitiesCohortConfig
from panfm.data.folder import write_site_folder
from panfm.data.table import read_table
from panfm.errors import ConfigError, DataError
from panfm.files import new_folder
from simulations.real_images import real_data

FOLDER = "modality2d"
Picture = Mapping[str, str]
"""A line of the data's manifest: file, split, modality, class, ..."""


def write_real_modalities(
    folder: Path,
    config: RealModalitiesCohortConfig,
    streams: Mapping[str, StreamConfig],
    progress: Callable[[int, int], None] = lambda *_: None,
) -> None:
    """Write site folders that point to the real pictures; no image is copied.

    Args:
        folder: Must not exist.
        streams: The run's; those that the cohort names must be of pictures.
        progress: Told how many places are written, of how many.
    Raises:
        ConfigError: $PANFM_REAL_DATA is unset or names no folder of ours, or a stream is not of pictures we have.
        DataError: the folder exists.
    """
    source = real_data(FOLDER) / FOLDER
    pictures = read_pictures(source)
    _check(config, streams, pictures)
    labels = class_labels(pictures)
    places = {f"sites/{name}": [(stream, "train") for stream in site.streams] for name, site in config.sites.items()}
    places["holdout"] = [(stream, "train") for stream in config.held_out]
    places["holdout"] += [(stream, "test") for stream in config.named_streams]
    with new_folder(folder) as partial:
        for done, (place, parts) in enumerate(places.items(), start=1):
            held = [(stream, picture) for stream, split in parts for picture in _of(pictures, stream, split)]
            rows = [(Path(each["file"]).stem, stream, source / each["file"], each["split"]) for stream, each in held]
            answers = [(Path(each["file"]).stem, *_answers(each, labels)) for _, each in held]
            write_site_folder(partial / place, rows, tuple(labels), answers)
            progress(done, len(places))
        (partial / "cohort.toml").write_text(_describe(config, labels), encoding="utf-8")


def read_pictures(source: Path) -> list[Picture]:
    """Lines of the data's manifest. Raises DataError: it does not hold."""
    path = source / "manifest.csv"
    try:
        return [cells for _, cells in read_table(path, ("file", "split", "modality", "class"))[1]]
    except DataError as error:
        raise DataError(f"{path}: {error}") from error


def class_labels(pictures: Iterable[Picture]) -> dict[str, tuple[str, str]]:
    """Label -> (modality, class), for every class of a modality that has more than one."""
    known = sorted({(each["modality"], each["class"]) for each in pictures})
    several = [pair for pair in known if sum(modality == pair[0] for modality, _ in known) > 1]
    return {f"{modality}-{kind.lower().replace('_', '-')}": (modality, kind) for modality, kind in several}


def _check(
    config: RealModalitiesCohortConfig, streams: Mapping[str, StreamConfig], pictures: Sequence[Picture]
) -> None:
    for stream in config.named_streams:
        if streams[stream].is_volume or not _of(pictures, stream, "train"):
            known = ", ".join(sorted({each["modality"] for each in pictures}))
            raise ConfigError(f"stream {stream}: expected pictures of one of {known}")


def _of(pictures: Iterable[Picture], stream: str, split: str) -> list[Picture]:
    modality = parse_stream(stream)[1]
    return [each for each in pictures if (each["modality"], each["split"]) == (modality, split)]


def _answers(picture: Picture, labels: Mapping[str, tuple[str, str]]) -> list[str]:
    """1 or 0 where the label is of the picture's modality, nothing elsewhere."""
    return [
        str(int(kind == picture["class"])) if modality == picture["modality"] else ""
        for modality, kind in labels.values()
    ]


def _describe(config: RealModalitiesCohortConfig, labels: Iterable[str]) -> str:
    description = config.model_dump(mode="json", by_alias=True)
    return tomli_w.dumps({**description, "labels": {name: {"kind": "class"} for name in labels}})
