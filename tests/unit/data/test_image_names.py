import re
from pathlib import PurePath

import pytest

from panfm.data.image_names import NamedImage, NameRules, UnclearNameError, image_of_mask, read_name, stem


def read(path, patterns=None, subject=None):

    return read_name(PurePath(path), NameRules(patterns or {}, re.compile(subject) if subject else None))


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("sub-01/anat/sub-01_T1w.nii.gz", NamedImage("sub-01", "brain-mr.t1")),
        ("sub-01/ses-02/anat/sub-01_ses-02_acq-hi_FLAIR.nii", NamedImage("sub-01", "brain-mr.flair", "ses-02")),
        ("sub-X/ct/sub-X_ct.nii.gz", NamedImage("sub-X", "brain-ct")),
        ("liver/TS-ct1_CT.nii.gz", NamedImage("TS-ct1", "liver-ct")),
        ("brain/MNI152_T1_MR.nii.gz", NamedImage("MNI152", "brain-mr.t1")),
        ("brain/P7_flair.nii.gz", NamedImage("P7", "brain-mr.flair")),
        ("patient 7/heart-ct.nii.gz", NamedImage("patient 7", "heart-ct")),
        ("test/chest_xray_0007.png", NamedImage("0007", "chest-xray", "", "test")),
        ("Validation/oct/17.png", NamedImage("17", "eye-oct", "", "val")),
        ("brain/007_ses-b_T2.nii.gz", NamedImage("007", "brain-mr.t2", "ses-b")),
        ("Brain/012_T1.NII.GZ", NamedImage("012", "brain-mr.t1")),
        ("chest/XRAY_0008.PNG", NamedImage("0008", "chest-xray")),
        ("us/breast_left/n3.png", NamedImage("n3", "breast-ultrasound")),
    ],
)
def test_what_a_path_says(path, expected):
    assert read(path) == expected


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("hippocampus_011.nii.gz", "no modality in the path; write --stream hippocampus-MODALITY='PATTERN'"),
        ("ct/CT_0000.jpg", "no organ in the path; write --stream ORGAN-ct='PATTERN'"),
        ("a1.nii.gz", "no organ and no modality in the path; write --stream ORGAN-MODALITY='PATTERN'"),
        ("sub-1/func/sub-1_task-rest_bold.nii.gz", "suffix bold of BIDS"),
        ("brain-mr.nii.gz", "no subject in the path; write --subject"),
    ],
)
def test_a_path_that_leaves_something_open_says_what_to_write(path, reason):
    with pytest.raises(UnclearNameError, match=reason):
        read(path)


@pytest.mark.parametrize(
    "pattern", ["*T1w*", "sub-01_T1w.nii.gz", "sub-01_T1w", "*/anat/*", "sub-01/anat/sub-01_T1w.nii.gz"]
)
def test_patterns_match_the_path_and_the_name_with_and_without_ending(pattern):
    assert read("sub-01/anat/sub-01_T1w.nii.gz", {pattern: "brain-mr"}).stream == "brain-mr"


def test_patterns_decide_alone_and_must_agree():
    with pytest.raises(UnclearNameError, match="matches no --stream"):
        read("liver/1_CT.nii.gz", {"*.png": "chest-xray"})
    with pytest.raises(UnclearNameError, match="matches --stream of brain-ct and brain-mr, expected one"):
        read("a1.nii", {"a*": "brain-mr", "*1.nii": "brain-ct"})
    assert read("a1.nii", {"a*": "brain-mr", "*1.nii": "brain-mr"}).subject == "a1"


def test_an_expression_finds_the_subject():
    assert read("x/brain/mr/p-12_z9.nii", subject=r"p-(\d+)").subject == "12"
    assert read("x/brain/mr/p-12_z9.nii", subject=r"p-\d+").subject == "p-12"
    with pytest.raises(UnclearNameError, match="no match of --subject"):
        read("x/brain/mr/q.nii", subject=r"p-(\d+)")


@pytest.mark.parametrize(
    ("path", "image"),
    [
        ("liver/a_CT_mask.nii.gz", ("liver", "a_CT")),
        ("anat/sub-1_T1w-seg.nii", ("anat", "sub-1_T1w")),
        ("labels/a_1.nii.gz", ("", "a_1")),
        ("p7/mask.nii.gz", ("p7", "")),
        ("images/a_1.nii.gz", None),
        ("a_masked_1.png", None),
    ],
)
def test_masks_by_their_names(path, image):
    assert image_of_mask(PurePath(path)) == image


@pytest.mark.parametrize(
    ("name", "expected"),
    [("a.nii.gz", "a"), ("a.b.nii", "a.b"), ("a.png", "a"), ("a", "a"), ("a.b.jpeg", "a.b"), (".x", "")],
)
def test_stem(name, expected):
    assert stem(PurePath(name)) == expected
