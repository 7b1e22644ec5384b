"""A phantom straight into memory, through the same preprocessing as files take."""

from collections.abc import Callable, Mapping

import numpy as np

from panfm.anatomy import Modality, parse_stream
from panfm.config import StreamConfig
from panfm.data.phantom.draw import Phantom, Subjects
from panfm.data.read import prepare_volume
from panfm.data.store import ImageStore
from panfm.errors import DataError


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
        like files: equals, bit for bit, the store opened from the files that `write_cohort` writes of these subjects.

    Raises:
        DataError: a stream is not an MR volume of an organ that the phantom has.
    """
    images, rows = {}, {}
    for stream, organ in organs_of(streams).items():
        if organ not in subjects.organs:
            continue
        held = np.flatnonzero(subjects.scanned[:, subjects.organs.index(organ)])
        volumes = np.empty((len(held), 1, *streams[stream].shape), dtype=np.float32)
        for position, index in enumerate(held):
            volumes[position] = prepare_volume(*phantom.render(subjects, int(index), organ), stream, streams[stream])
            on_image()
        images[stream], rows[stream] = volumes, held
    return ImageStore(subjects.names, (split,) * len(subjects.names), images, rows)


def organs_of(streams: Mapping[str, StreamConfig]) -> dict[str, str]:
    """Stream -> its organ. Raises DataError for what the phantom cannot draw."""
    organs = {}
    for stream, config in streams.items():
        organ, modality = parse_stream(stream)
        if modality is not Modality.MR or not config.is_volume:
            raise DataError(f"stream {stream}: the phantom has MR volumes only, expected <organ>-mr with three axes")
        organs[stream] = organ
    return organs
