"""Refuses a cohort whose places share images or people, before anything is trained on it."""

from pathlib import Path

from panfm.config import RunConfig, load_site, site_folders
from panfm.data.cache import open_store
from panfm.data.check_places import Place, refuse_leaks


def check_cohort(folder: Path, run: RunConfig) -> None:
    """Compare the sites of a cohort and its hold-out, by subject and by the content of every image.

    Builds the caches of images where there are none, as the sites would.

    Raises:
        DataError: an image is at two places, a held-out subject is at a site, or as `open_store`.
        NoSubjectsError: a site has nobody to train on, or the hold-out nobody to test on.
    """
    places = []
    for site in site_folders(folder / "sites"):
        store = open_store(site, run.streams)
        store.members("train", str(site))
        places.append(Place.of_store(load_site(site).name, store))
    if (folder / "holdout" / "site.toml").is_file():
        store = open_store(folder / "holdout", run.streams)
        store.members("test", str(folder / "holdout"))
        places.append(Place.of_store("holdout", store, is_holdout=True))
    refuse_leaks(places)
