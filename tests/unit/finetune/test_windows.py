"""Windows of large scans: where they lie, how they are blended, and masks that overlay their scans in RAS."""

import itertools

import nibabel
import numpy as np
import pytest
import torch

import panfm
from panfm.data.image_files import store_of_files
from panfm.data.readers import Volume
from panfm.finetune.finetune_job import FinetuneJob
from panfm.finetune.finetuned_model import TaskModel
from panfm.finetune.task_description import TaskDescription
from panfm.finetune.task_heads import TaskHead
from panfm.finetune.windows import LargeImage, covering, slide, window_starts, window_weights
from panfm.models import build_model
from tests.unit.finetune.conftest import AFFINE


def test_windows_overlap_by_half_and_end_with_the_image():
    assert window_starts(8, 8) == [0]
    assert window_starts(9, 8) == [0, 1]
    assert window_starts(20, 8) == [0, 4, 8, 12]
    assert window_starts(21, 8) == [0, 4, 8, 12, 13]
    assert window_starts(3, 1) == [0, 1, 2]


@pytest.mark.parametrize("sizes", [((9, 8, 6), (8, 8, 4)), ((13, 7), (4, 3))])
def test_equal_predictions_stay_what_they_are(sizes):
    cover, shape = sizes
    image = torch.rand(2, *cover, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(slide(lambda windows: windows, image, shape), image, atol=1e-6)


@pytest.mark.slow
def test_as_monai_slides():
    from monai.inferers import sliding_window_inference

    image = torch.rand(1, 11, 9, 6, generator=torch.Generator().manual_seed(0))
    places = torch.arange(5 * 4 * 4).view(1, 1, 5, 4, 4) / 80

    def predict(windows):
        return torch.cat([windows * places, windows.mean(dim=(2, 3, 4), keepdim=True).expand_as(windows)], dim=1)

    theirs = sliding_window_inference(image[None], (5, 4, 4), 2, predict, overlap=0.5, mode="gaussian")
    assert torch.allclose(slide(predict, image, (5, 4, 4)), theirs[0], atol=1e-6)
    assert window_weights((5, 4)).argmax() in (9, 10)


def test_only_scans_that_are_longer_by_more_than_a_patch_are_covered(make_run):
    config = make_run().streams["brain-mr"]
    assert covering(Volume(np.zeros((12, 8, 8), np.float32), AFFINE), config) is None
    cover = covering(Volume(np.zeros((13, 5, 8), np.float32), AFFINE), config)
    assert cover is not None
    assert cover.shape == (13, 8, 8)


def test_half_of_the_windows_hold_the_mask():
    mask = np.zeros((30, 20, 16), np.uint8)
    mask[29, 0, 7] = 1
    large = LargeImage(np.arange(mask.size, dtype=np.float16).reshape(1, *mask.shape) % 64, mask)
    generators = [torch.Generator().manual_seed(seed) for seed in range(60)]
    drawn = [large.window((8, 8, 4), generator) for generator in generators]
    assert {(tuple(image.shape), tuple(part.shape)) for image, part in drawn} == {((1, 8, 8, 4), (8, 8, 4))}
    assert 18 < sum(bool(part.any()) for _, part in drawn) < 42
    image, part = next((image, part) for image, part in drawn if part.any())
    assert image[0][part.bool()].item() == large.image[0, 29, 0, 7]


class BrightVoxels(TaskHead):
    """Knows the answer: what is bright is of the class."""

    def forward(self, model, batch):
        image = batch.images["brain-mr"][:, 0]
        return 50.0 * torch.stack([0.5 - image, image - 0.5], dim=1)

    def loss(self, outputs, targets):
        raise NotImplementedError

    def probabilities(self, outputs):
        return outputs.softmax(dim=1)


def oblique_scan(large: bool) -> nibabel.Nifti1Image:
    """A bright box off the centre, in voxels of 1 x 1.5 x 2 mm whose axes are turned by 20 and 15 degrees."""
    one, other = np.deg2rad(20.0), np.deg2rad(15.0)
    turn = np.array([[np.cos(one), -np.sin(one), 0], [np.sin(one), np.cos(one), 0], [0, 0, 1]])
    turn = turn @ np.array([[1, 0, 0], [0, np.cos(other), -np.sin(other)], [0, np.sin(other), np.cos(other)]])
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = turn @ np.diag([1.0, 1.5, 2.0]), [11.0, -7.0, 3.0]
    shape = (48, 30, 16) if large else (16, 11, 4)
    voxels = np.random.default_rng(0).uniform(0.0, 10.0, shape).astype(np.float32)
    voxels[shape[0] // 2 : -4, 3 : shape[1] // 2, 1 : shape[2] // 2 + 1] = 200.0
    return nibabel.Nifti1Image(voxels, affine)


def in_place(image: nibabel.Nifti1Image, mask) -> np.ndarray:
    """Centre of a mask, in mm in R, A, S."""
    return nibabel.affines.apply_affine(image.affine, np.argwhere(np.asarray(mask)).mean(axis=0))


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("codes", ["RAS", "LPS", "ASR", "SLP"])
def test_masks_overlay_oblique_scans_however_they_are_stored(make_run, tmp_path, large, codes):
    scan = oblique_scan(large)
    path, run = tmp_path / "scan.nii.gz", make_run()
    turn = nibabel.orientations.ornt_transform(
        nibabel.io_orientation(scan.affine), nibabel.orientations.axcodes2ornt(codes)
    )
    stored = scan.as_reoriented(turn)
    nibabel.save(stored, path)
    task = TaskDescription(
        kind="segmentation", name="segmentation", outputs=("0", "3"), values=(0, 3), stream="brain-mr"
    )
    store = store_of_files([path], "brain-mr", run.streams["brain-mr"], lambda *_: None)
    model = build_model(run).eval()
    [mask] = TaskModel(task, BrightVoxels()).segment(model, store, {0: path})
    bright = np.asarray(stored.dataobj) > 100.0
    assert mask.shape == stored.shape
    assert np.allclose(mask.affine, stored.affine)
    assert np.linalg.norm(in_place(mask, np.asarray(mask.dataobj) == 3) - in_place(stored, bright)) < 0.5
    both = bright & (np.asarray(mask.dataobj) == 3)
    assert 2 * both.sum() / (bright.sum() + (np.asarray(mask.dataobj) == 3).sum()) > 0.85


def enlarge(site, number):
    """Puts a scan of the site into the corner of one three times as long, along each axis."""
    stem = f"clinic-{number}-only"
    for suffix in ("", "-seg"):
        image = nibabel.load(site / f"{stem}{suffix}.nii.gz")
        voxels = np.asarray(image.dataobj)
        padded = np.pad(voxels, [(0, 2 * size) for size in voxels.shape], mode="edge" if not suffix else "constant")
        nibabel.save(nibabel.Nifti1Image(padded, image.affine), site / f"{stem}{suffix}.nii.gz")


@pytest.mark.slow
def test_large_scans_are_trained_and_segmented_whole(make_run, write_run, labelled_site, settings_of, tmp_path):
    model, site = write_run(make_run()), labelled_site()
    for number in (1, 3, 6):  # train, test, val
        enlarge(site, number)
    job = FinetuneJob.open(settings_of(model, site, "segmentation"), tmp_path / "out")
    assert "brain-mr: 3 scans are larger than its grid, read by windows" in job.data.notes
    assert job.run().find("grid", "dice").value > 0.9
    mask = nibabel.load(tmp_path / "out" / "masks" / "0001.nii.gz")
    assert mask.shape == (27, 24, 18)
    [again] = panfm.load(tmp_path / "out").predict({"brain-mr": site / "clinic-3-only.nii.gz"})
    assert np.array_equal(again.dataobj, mask.dataobj)
    FinetuneJob.open(settings_of(model, site, "segmentation"), tmp_path / "other").run()
    first, second = ((tmp_path / name / "model" / "head.safetensors").read_bytes() for name in ("out", "other"))
    assert first == second


def test_every_window_is_read_once():
    seen = []

    def predict(windows):
        seen.extend(windows[:, 0].flatten(1).min(dim=1).values.tolist())
        return windows

    corners = itertools.product([0, 2, 4], [0, 2])
    image = torch.arange(8.0 * 6).view(1, 8, 6)
    slide(predict, image, (4, 4))
    assert seen == [float(top * 6 + left) for top, left in corners]
