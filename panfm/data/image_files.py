"""Image files as subjects, without a site around them."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from panfm.config import StreamConfig
from panfm.data.read import read_image
from panfm.data.store import ImageStore
from panfm.errors import DataError


def store_of_files(
    paths: Sequence[Path],
    stream: str,
    config: StreamConfig,
    progress: Callable[[int, int], None] = lambda *_: None,
) -> ImageStore:
    """Images of one stream in memory; each file is a subject, in split test, under its name without suffixes.

    Args:
        progress: Called with (images done, images in all).
    Raises:
        DataError: a file cannot be used, or two have one name.
    """
    subjects: dict[str, Path] = {}
    for path in paths:
        if (first := subjects.setdefault(_subject(path), path)) is not path:
            raise DataError(f"{path}: the same subject as {first}, expected a file name for each subject")
    images = np.empty((len(paths), config.channels, *config.shape), dtype=np.float32)
    for number, path in enumerate(paths):
        images[number] = read_image(path, stream, config)
        progress(number + 1, len(paths))
    rows = np.arange(len(paths), dtype=np.int64)
    return ImageStore(tuple(subjects), ("test",) * len(paths), {stream: images}, {stream: rows})


def _subject(path: Path) -> str:
    name = path.stem
    return Path(name).stem if name.lower().endswith(".nii") else name
