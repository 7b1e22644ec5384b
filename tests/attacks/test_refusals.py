"""The server asks for what a site must refuse, and reads the refusal for what it says of patients."""

import nibabel
import numpy as np
import pytest

from panfm.config import dump_toml, parse_run
from panfm.errors import LimitError
from panfm.models.sizes import sizes_of
from panfm.sharing.frames import Frame, Kind, encode
from panfm.sharing.messages import Invitation
from panfm.site import Site, answer
from panfm.site.handler import scrub
from tests.unit.site.test_private_site import PRIVACY, RANDOM, RUN

PRIVATE = "epsilon = 4.0\ndelta = 1e-3\npublic-subjects = 40\n"
LARGE = RUN.replace("shape = [8, 8, 8]", "shape = [64, 64, 64]")


def answered(folder, text: str) -> bytes:
    return encode(answer(Site(folder), Frame(Kind.HANDSHAKE, Invitation(dump_toml(parse_run(text))).to_records())))


@pytest.mark.parametrize(
    ("limits", "text"),
    [
        (PRIVATE + "step-gib = 1e-6", RUN + RANDOM + PRIVACY),
        (PRIVATE + "cache-gib = 0.001", LARGE + RANDOM + PRIVACY),
        (PRIVATE, RUN + RANDOM + PRIVACY),
        ("step-gib = 1e-6", RUN),
        ("cache-gib = 1e-5", RUN),
        ("smallest-batch = 8\nsmallest-steps = 1", RUN.replace("[train]", "[train]\nbatch-size = 8")),
    ],
    ids=["private step", "private cache", "private handshake", "step", "cache", "smallest batch"],
)
def test_server_counts_patients_by_what_a_refusal_says_and_reads_the_same_for_one_more(
    tmp_path, write_site, limits, text
):
    """A refusal said how many bytes a step on all patients fills, which is their number times a known one."""
    few, more = (
        write_site(tmp_path / name, "alpha", ("brain", "heart"), subjects, extra=f"[limits]\n{limits}\n")
        for name, subjects in (("few", 6), ("more", 7))
    )
    assert answered(few, text) == answered(more, text)


def test_server_finds_no_limit_of_a_step_between_one_patient_and_two(tmp_path, write_site):
    """Whether a private step is too large is decided by the description, whoever is there."""
    text = (RUN + RANDOM + PRIVACY).replace("[train]", "[train]\nbatch-size = 64")
    limit = 0.5 * sizes_of(parse_run(text)).step_bytes / 2**30
    one, many = (
        write_site(
            tmp_path / name, "alpha", ("brain", "heart"), subjects, extra=f"[limits]\n{PRIVATE}step-gib = {limit}\n"
        )
        for name, subjects in (("one", 2), ("many", 9))
    )
    assert answered(one, text) == answered(many, text)


@pytest.mark.parametrize("spacing", ["20.0", "40.0", "1000.0"])
def test_server_searches_for_the_voxel_size_of_one_scan_and_every_spacing_is_answered_alike(
    tmp_path, write_site, spacing
):
    """A refusal said by how much the run's voxels are coarser than those of the finest scan."""
    text = (RUN + RANDOM + PRIVACY).replace("spacing-mm = [8.0, 8.0, 8.0]", f"spacing-mm = [{spacing}, 8.0, 8.0]")
    plain, odd = (
        write_site(tmp_path / name, "alpha", ("brain", "heart"), extra=f"[limits]\n{PRIVATE}")
        for name in ("plain", "odd")
    )
    voxels = np.asarray(nibabel.load(odd / "alpha-2-brain.nii.gz").dataobj)
    image = nibabel.Nifti1Image(voxels, np.diag([0.4871, 8.0, 8.0, 1.0]))
    nibabel.save(image, odd / "alpha-2-brain.nii.gz")
    assert answered(plain, text) == answered(odd, text)


def test_a_limit_error_that_nobody_has_declared_public_tells_nothing():
    line = "LimitError: this goes beyond what this site allows; its log tells more"
    assert scrub(LimitError("7 training subjects")) == line
    assert scrub(LimitError("7 training subjects", public="too few")) == "LimitError: too few"
