"""A cohort that shares images or people between its places is refused before training."""

import pytest

from panfm.config import parse_run
from panfm.errors import DataError, NoSubjectsError
from simulations.cohorts.leaks import check_cohort
from tests.unit.data.conftest import SiteFolder, volume

RUN = """
name = "run"
[streams]
brain-mr = { shape = [8, 8, 8], patch = [4, 4, 4], spacing-mm = [2.0, 2.0, 2.0] }
"""


@pytest.fixture
def cohort(tmp_path):
    """Two sites and a hold-out of two subjects each."""
    places = {}
    for number, name in enumerate(("north", "south", "holdout")):
        place = SiteFolder(tmp_path / ("holdout" if name == "holdout" else f"sites/{name}"))
        for index in range(2):
            voxels = volume(10 * number + index)
            place.add(f"{name}-{index}", voxels=voxels, split="test" if name == "holdout" else "train")
        (place.folder / "site.toml").write_text(f'name = "{name}"\n')
        places[name] = place
    return places


def test_a_sound_cohort_passes_with_and_without_a_holdout(cohort, tmp_path):
    check_cohort(tmp_path, parse_run(RUN))
    (cohort["holdout"].folder / "site.toml").unlink()
    check_cohort(tmp_path, parse_run(RUN))


@pytest.mark.parametrize(("place", "split"), [("south", "train"), ("holdout", "test")])
def test_one_image_at_two_places_stops_a_simulation(cohort, tmp_path, place, split):
    cohort[place].add("copy", voxels=volume(0).astype(float), split=split)
    (cohort[place].folder / "site.toml").write_text(f'name = "{place}"\n')
    with pytest.raises(
        DataError, match=f"^{place}: copy brain-mr: found the same content as north-0 brain-mr at north"
    ):
        check_cohort(tmp_path, parse_run(RUN))


def test_a_held_out_subject_at_a_site_stops_a_simulation(cohort, tmp_path):
    cohort["holdout"].add("NORTH-00", voxels=volume(99), split="test")
    (cohort["holdout"].folder / "site.toml").write_text('name = "holdout"\n')
    with pytest.raises(DataError, match="subject 'NORTH-00' of the hold-out at north as well"):
        check_cohort(tmp_path, parse_run(RUN))


def test_a_site_that_is_called_holdout_is_compared_as_well(cohort, tmp_path):
    place = SiteFolder(tmp_path / "sites" / "holdout")
    place.add("copy", voxels=volume(0), split="train")
    (place.folder / "site.toml").write_text('name = "holdout"\n')
    with pytest.raises(DataError, match="found the same content as"):
        check_cohort(tmp_path, parse_run(RUN))


def test_nobody_to_train_on_or_to_test_on(cohort, tmp_path):
    cohort["south"].lines = [line.replace(",train,", ",val,") for line in cohort["south"].lines]
    cohort["south"].write()
    with pytest.raises(NoSubjectsError, match="south: found no subject in the train split"):
        check_cohort(tmp_path, parse_run(RUN))


def test_an_image_whose_part_of_the_run_shows_nothing_stops_a_simulation(cohort, tmp_path):
    hollow = volume(7, (24, 24, 24))
    hollow[4:20, 4:20, 4:20] = 5
    cohort["south"].add("hollow", voxels=hollow, split="train")
    (cohort["south"].folder / "site.toml").write_text('name = "south"\n')
    with pytest.raises(DataError, match=r"^south: hollow brain-mr: found one value all over the part that the run's"):
        check_cohort(tmp_path, parse_run(RUN))
