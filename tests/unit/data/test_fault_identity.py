"""Kind 1: identity by position or bytes."""

import gzip

import nibabel as nib
import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from panfm.cli import main
from panfm.config import load_site
from panfm.data.cache import open_store
from panfm.data.check_places import Place, leaks, refuse_leaks
from panfm.data.manifest import read_manifest
from panfm.errors import DataError
from tests.unit.data.conftest import STREAM, SiteFolder, volume


def rows_of(site):
    return [(row.subject, row.path) for row in read_manifest(site.folder, load_site(site.folder))]


@pytest.fixture
def quarantined(site):
    """Subjects a to c; the image of b is constant, and listed in the quarantine."""
    for subject in "abc":
        site.add(subject, voxels=np.ones((4, 4, 4), np.int16) if subject == "b" else None)
    assert site.check("--quarantine").exit_code == 0
    return site


KEPT_OUT = {
    "rows before it": lambda site: site.lines.insert(0, "z,brain-mr,z.nii.gz,,"),
    "rows in another order": lambda site: site.lines.reverse(),
    "a blank line": lambda site: site.lines.insert(0, ""),
    "another spelling of its subject": lambda site: site.lines.__setitem__(1, "B,brain-mr,b_brain-mr.nii.gz,,"),
    "another spelling of its path": lambda site: site.lines.__setitem__(1, "b,brain-mr,./x/../b_brain-mr.nii.gz,,"),
    "another split": lambda site: site.lines.__setitem__(1, "b,brain-mr,b_brain-mr.nii.gz,val,"),
}


@pytest.mark.parametrize("change", KEPT_OUT)
def test_a_quarantined_row_stays_out_wherever_its_row_goes(quarantined, change):
    KEPT_OUT[change](quarantined)
    quarantined.write()
    assert {subject.lower() for subject, _ in rows_of(quarantined)} - {"z"} == {"a", "c"}


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_a_quarantined_image_stays_out_under_another_name(quarantined, suffix):
    content = gzip.decompress((quarantined.folder / "b_brain-mr.nii.gz").read_bytes())
    (quarantined.folder / f"moved{suffix}").write_bytes(gzip.compress(content) if suffix == ".nii.gz" else content)
    quarantined.lines[1] = f"b,brain-mr,moved{suffix},,"
    quarantined.write()
    assert rows_of(quarantined) == [("a", "a_brain-mr.nii.gz"), ("c", "c_brain-mr.nii.gz")]


def test_another_image_of_the_subject_comes_back(quarantined):
    quarantined.nifti("better.nii.gz", volume(9))
    quarantined.lines[1] = "b,brain-mr,better.nii.gz,,"
    quarantined.write()
    assert ("b", "better.nii.gz") in rows_of(quarantined)


def test_a_quarantined_repetition_leaves_its_first_row_in(site):
    site.add("a")
    site.lines.append(site.lines[0])
    site.write()
    site.check("--quarantine")
    assert len(rows_of(site)) == 1
    site.lines.pop()
    site.write()
    assert len(rows_of(site)) == 1


def resaved(site, name, change):
    image = nib.load(site.folder / "a_brain-mr.nii.gz")
    voxels, affine = np.asarray(image.dataobj), image.affine
    if change == "float":
        voxels = voxels.astype(np.float64)
    elif change == "axes turned":
        voxels, affine = (
            voxels[::-1].transpose(1, 0, 2),
            affine @ np.array([[0, -1, 0, voxels.shape[0] - 1], [1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]]),
        )
    elif change == "another voxel size":
        affine = np.diag([1.0, 1.0, 3.0, 1.0])
    elif change == "another place":
        affine = affine + np.array([[0, 0, 0, 5.0], *[[0.0] * 4] * 3])
    kind = nib.Nifti2Image if change == "NIfTI-2" else nib.Nifti1Image
    nib.save(kind(voxels, affine), site.folder / name)


@pytest.mark.parametrize("change", ["float", "axes turned", "another voxel size", "another place", "NIfTI-2"])
def test_a_scan_saved_anew_is_the_same(site, change):
    site.add("a")
    resaved(site, "b.nii", change)
    site.row("b", path="b.nii")
    site.assert_one_fault("b.nii: found the same content as a_brain-mr.nii.gz, expected an image of its own")
    with pytest.raises(DataError, match=r"b\.nii: found the same content as .*a_brain-mr\.nii\.gz"):
        open_store(site.folder, {"brain-mr": STREAM})


@pytest.mark.parametrize("mode", ["L", "RGB", "P", "RGBA"])
def test_a_picture_saved_anew_is_the_same(site, mode):
    pixels = Image.fromarray(np.random.default_rng(0).integers(0, 255, (9, 9)).astype(np.uint8))
    pixels.save(site.write() / "a.png")
    pixels.convert(mode).save(site.folder / "b.tif")
    site.row("a", "chest-xray", "a.png")
    site.row("b", "chest-xray", "b.tif")
    site.assert_one_fault("b.tif: found the same content as a.png")


def test_one_image_under_two_streams_is_refused_wherever_data_is_opened(site, streams):
    site.add("a")
    site.nifti("copy.nii", volume(0))
    site.row("a", "heart-mr", "copy.nii")
    for _ in range(2):  # the second time from the cache
        with pytest.raises(DataError, match=r"copy\.nii: found the same content as"):
            open_store(site.folder, streams)
    store = open_store(site.folder, {"brain-mr": STREAM})
    assert [len(digest) for digest in store.digests["brain-mr"]] == [16]


@pytest.fixture
def places(tmp_path):
    """Two sites and a hold-out, sound and apart."""
    made = {}
    for number, name in enumerate(("north", "south", "holdout")):
        made[name] = SiteFolder(tmp_path / name)
        for index in range(2):
            split = "test" if name == "holdout" else "train"
            made[name].add(f"{name}-{index}", voxels=volume(10 * number + index), split=split)
        (tmp_path / name / "site.toml").write_text(f'name = "{name}"\n')
    return made


def check(places, *options):
    words = ["site", "check", *(str(places[name].folder) for name in ("north", "south"))]
    result = CliRunner().invoke(main, [*words, "--holdout", str(places["holdout"].folder), *options])
    return result.exit_code, [line for line in result.output.splitlines() if ": found " in line or "note:" in line]


def add(places, name, subject, voxels, split="train"):
    places[name].nifti(f"{subject}_brain-mr.nii.gz", voxels)
    places[name].lines.append(f"{subject},brain-mr,{subject}_brain-mr.nii.gz,{split},")
    manifest = places[name].folder / "manifest.csv"
    manifest.write_text("\n".join([places[name].header, *places[name].lines]) + "\n")


def test_places_apart_are_sound(places):
    assert check(places) == (0, [])


@pytest.mark.parametrize("name", ["south", "holdout"])
def test_one_image_at_two_places_is_a_fault_of_the_later(places, name):
    add(places, name, "twin", volume(0).astype(np.float32), "val")
    code, lines = check(places)
    assert code == 1
    assert lines == [
        f"{name}: twin_brain-mr.nii.gz: found the same content as north-0_brain-mr.nii.gz at north, "
        "expected an image at one place"
    ]
    assert check(places, "--quarantine")[0] == 0
    assert "twin" in (places[name].folder / "quarantine.csv").read_text()


@pytest.mark.parametrize("spelling", ["north-0", "NORTH-00", "no\u200brth-0"])
def test_a_held_out_subject_at_a_site_is_a_fault_by_any_spelling(places, spelling):
    add(places, "holdout", spelling, volume(77), "test")
    code, lines = check(places)
    assert code == 1
    assert len(lines) == 1
    assert "of the hold-out at north as well, expected held-out subjects who are at no site" in lines[0]


def test_sites_that_number_their_subjects_alike_are_told(places):
    add(places, "north", "007", volume(50))
    add(places, "south", "7", volume(51))
    code, lines = check(places)
    assert code == 0
    assert lines == ["note: north and south: 1 subject of the same name, taken for different people: 007"]


def test_two_folders_of_one_name_are_refused(places):
    (places["south"].folder / "site.toml").write_text('name = "north"\n')
    words = ["site", "check", str(places["north"].folder), str(places["south"].folder)]
    result = CliRunner().invoke(main, words)
    assert (result.exit_code, "found the name 'north'" in result.stderr) == (1, True)


def test_leaks_of_opened_stores(places):
    def opened():
        return [
            Place.of_store(name, open_store(place.folder, {"brain-mr": STREAM}), is_holdout=name == "holdout")
            for name, place in places.items()
        ]

    assert not any(leaks(opened()).values())
    add(places, "holdout", "north-0", volume(78), "test")
    add(places, "south", "twin", volume(0))
    with pytest.raises(DataError) as caught:
        refuse_leaks(opened())
    assert [line.partition(", expected")[0] for line in str(caught.value).splitlines()] == [
        "south: twin brain-mr: found the same content as north-0 brain-mr at north",
        "holdout: north-0 brain-mr: found subject 'north-0' of the hold-out at north as well",
    ]
