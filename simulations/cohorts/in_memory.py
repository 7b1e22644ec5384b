"""Drawn patients straight into memory, through the same preprocessing as their files."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from PIL import Image

from panfm.config import StreamConfig
from panfm.data.read import prepare_picture, prepare_volume
from panfm.data.store import ImageStore
from simulations.cohorts.phantom_draw import Phantom, Subjects, organs_of
from simulations.cohorts.picture_cohort import Patient, check_streams


def phantom_store(
    phantom: Phantom,
    subjects: Subjects,
    streams: Mapping[str, StreamConfig],
    *,
    split: str = "train",
    on_image: Callable[[], None] = lambda: None,
) -> ImageStore:
    """Render the subjects' images at the model's resolution.

    Guarantees:
        like files: equals, bit for bit, the store opened from the files that `PhantomCohort` writes of these subjects.

    Raises:
        DataError: a stream is not an MR volume of an organ that the phantom has.
    """
    images, rows = {}, {}
    for stream, organ in organs_of(streams).items():
        if organ not in subjects.organs:
            continue
        holders = np.flatnonzero(subjects.scanned[:, subjects.organs.index(organ)])
        volumes = np.empty((len(holders), 1, *streams[stream].shape), dtype=np.float32)
        for position, index in enumerate(holders):
            volumes[position] = prepare_volume(*phantom.render(subjects, int(index), organ), stream, streams[stream])
            on_image()
        images[stream], rows[stream] = volumes, holders
    return ImageStore(subjects.names, (split,) * len(subjects.names), images, rows)


def picture_store(
    patients: Sequence[Patient],
    streams: Mapping[str, StreamConfig],
    *,
    on_image: Callable[[], None] = lambda: None,
) -> ImageStore:
    """The patients' pictures in memory, in the patients' order.

    Guarantees:
        like files: equals, bit for bit, the store opened from the files that `PictureCohort` writes of them.
    Raises:
        DataError: a stream is not one of pictures.
    """
    check_streams(streams)
    images, rows = {}, {}
    for stream, config in streams.items():
        holders = [at for at, patient in enumerate(patients) if patient.stream == stream]
        if holders:
            images[stream] = np.empty((len(holders), config.channels, *config.shape), dtype=np.float32)
            rows[stream] = np.array(holders, dtype=np.int64)
        for position, at in enumerate(holders):
            images[stream][position] = prepare_picture(Image.fromarray(patients[at].picture()), config)
            on_image()
    return ImageStore(tuple(p.name for p in patients), tuple(p.split for p in patients), images, rows)
