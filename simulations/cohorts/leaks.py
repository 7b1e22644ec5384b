"""Refuses a cohort, before training, whose folders share images or subjects, or hold images of one constant value."""

import hashlib
import json
from pathlib import Path

from panfm.config import RunConfig, load_site, site_folders, site_path
from panfm.data.cache import open_store
from panfm.data.check_places import Place, refuse_leaks
from panfm.data.intensity import EMPTY_PART, is_constant
from panfm.data.label_kinds import RULES
from panfm.data.store import ImageStore
from panfm.errors import DataError

HOLDOUT = "the hold-out"
"""Key of its hashes, which no folder of a site has: names have no blanks."""


def check_cohort(folder: Path, run: RunConfig) -> dict[str, dict[str, str]]:
    """Compare the sites of a cohort and its hold-out, by subject and by the content of every image.

    Builds the caches of images where there are none, as the sites would.

    Returns:
        Folder of a site, or `HOLDOUT` -> hashes of its `images`, with their subjects, and of its `labels`.
    Raises:
        DataError: an image is at two places, or shows one value in the part that the run takes, or a held-out subject
            is at a site; or as `open_store`.
        NoSubjectsError: a site has nobody to train on, or the hold-out nobody to test on.
    """
    sites = [(site, site.name, load_site(site).name, "train") for site in site_folders(folder / "sites")]
    if (folder / "holdout" / "site.toml").is_file():
        sites.append((folder / "holdout", HOLDOUT, "holdout", "test"))
    places, hashes = [], {}
    for place, key, name, split in sites:
        store = open_store(place, run.streams)
        store.members(split, str(place))
        _refuse_empty(key, store)
        places.append(Place.of_store(name, store, is_holdout=key == HOLDOUT))
        hashes[key] = {"images": _hash_of_images(store), "labels": _hash_of_labels(place)}
    refuse_leaks(places)
    return hashes


def _hash_of_images(store: ImageStore) -> str:
    """Hash of the content of all images, in any order, with subject, split, stream and session of each."""
    images = [
        (
            store.subjects[at],
            store.splits[at],
            stream,
            store.sessions[stream][number] if stream in store.sessions else "",
            digest.hex(),
        )
        for stream, digests in store.digests.items()
        for number, (at, digest) in enumerate(zip(store.rows[stream], digests, strict=True))
    ]
    return hashlib.sha256(json.dumps(sorted(images)).encode()).hexdigest()


def _hash_of_labels(place: Path) -> str:
    """Hash of a place's label table and of the rules beside it; empty if it has none."""
    if (labels := load_site(place).labels) is None:
        return ""
    path = site_path(place, labels)
    return hashlib.sha256(
        b"".join(one.read_bytes() for one in (path, path.with_name(RULES)) if one.is_file())
    ).hexdigest()


def _refuse_empty(place: str, store: ImageStore) -> None:
    """Raise DataError, one line for each image that shows one value all over."""
    remedy = "voxels that differ: another shape or spacing, or without it (panfm site check --run --quarantine)"
    if lines := [
        f"{place}: {store.subjects[at]} {stream}: found {EMPTY_PART}, expected {remedy}"
        for stream, images in store.images.items()
        for at, image in zip(store.rows[stream], images, strict=True)
        if is_constant(image)
    ]:
        raise DataError("\n".join(lines))
