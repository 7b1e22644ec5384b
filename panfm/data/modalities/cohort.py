"""A modalities cohort on disk: one folder per hospital, PNG files, manifests and labels.

    cohort.toml            what it is: seed, sizes, and what each label stands for
    sites/<site>/          site.toml  manifest.csv  labels.csv  images/<subject>_<stream>.png
    holdout/               the same for patients at no site: test, and train for the streams that no site has

The folder appears whole or not at all, and the same description gives the same bytes.
"""

import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import tomli_w
from PIL import Image

from panfm.config import StreamConfig
from panfm.config.cohort import ModalitiesCohortConfig
from panfm.data.folder import write_site_folder
from panfm.data.modalities.draw import LABELS, Patient, check_streams, draw_places, patient_labels
from panfm.files import new_folder


def write_modalities(
    folder: Path,
    config: ModalitiesCohortConfig,
    streams: Mapping[str, StreamConfig],
    progress: Callable[[int, int], None] = lambda *_: None,
) -> None:
    """Write a cohort.

    Args:
        folder: must not exist.
        config: seed, sites and their patients, streams held out.
        streams: the run's; those that the cohort names must be of pictures.
        progress: told how many pictures are written, of how many.

    Raises:
        DataError: the folder exists or cannot be written, or a stream is not one of pictures.
    """
    check_streams({stream: streams[stream] for stream in config.named_streams})
    places = draw_places(config)
    total, done = sum(map(len, places.values())), 0
    with new_folder(folder) as partial:
        for place, patients in places.items():
            for written in _write_pictures(partial / place, patients):
                done += written
                progress(done, total)
            rows = [(each.name, each.stream, _path(each), each.split) for each in patients]
            labels = [(each.name, *row) for each, row in zip(patients, patient_labels(patients), strict=True)]
            write_site_folder(partial / place, rows, LABELS, labels)
        (partial / "cohort.toml").write_text(_describe(config, places), encoding="utf-8")


def _write_pictures(folder: Path, patients: Sequence[Patient]) -> Iterable[int]:
    """Write the pictures of one place; yields 1 for each."""
    (folder / "images").mkdir(parents=True)
    for patient in patients:
        content = io.BytesIO()
        Image.fromarray(patient.picture()).save(content, "PNG")
        (folder / _path(patient)).write_bytes(content.getvalue())
        yield 1


def _path(patient: Patient) -> str:
    return f"images/{patient.name}_{patient.stream}.png"


def _describe(config: ModalitiesCohortConfig, places: Mapping[str, Sequence[Patient]]) -> str:
    labels = {name: {"kind": "class"} for name in LABELS}
    subjects = {place: len(patients) for place, patients in places.items()}
    return tomli_w.dumps({**config.model_dump(mode="json", by_alias=True), "subjects": subjects, "labels": labels})
