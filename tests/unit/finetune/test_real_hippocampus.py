"""The hippocampus in real MR volumes, from an untrained model and 28 masks."""

import os
from pathlib import Path

import nibabel
import numpy as np
import pytest

import panfm
from panfm.config import parse_run
from panfm.finetune.finetune_job import FinetuneJob

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif("PANFM_REAL_DATA" not in os.environ, reason="PANFM_REAL_DATA names no folder of real images"),
]
RUN = """
name = "hippocampus"
[streams]
hippocampus-mr = { spacing-mm = [2.0, 2.0, 2.0], shape = [20, 28, 20], patch = [4, 4, 4] }
"""


def test_a_few_volumes_are_segmented_on_their_own_grid(write_run, settings_of, tmp_path):
    source = Path(os.environ["PANFM_REAL_DATA"]) / "hippocampus"
    volumes = sorted((source / "images").glob("*.nii.gz"))[:34]
    rows = ["subject,stream,path,mask,split"]
    for number, path in enumerate(volumes):
        split = "test" if number >= 28 else "val" if number >= 24 else "train"
        rows.append(f"p{number},hippocampus-mr,{path},{source / 'labels' / path.name},{split}")
    site = tmp_path / "site"
    site.mkdir()
    (site / "site.toml").write_text('name = "clinic"\n')
    (site / "manifest.csv").write_text("\n".join(rows) + "\n")
    settings = settings_of(write_run(parse_run(RUN)), site, "segmentation", steps=120, validate_every=40, augment=False)
    result = FinetuneJob.open(settings, tmp_path / "out").run()
    assert all(result.find("fine-tuned", "dice", group).value > 0.6 for group in ("1", "2"))
    assert result.find("grid", "dice").value > 0.8
    scan = nibabel.load(volumes[28])
    [mask] = panfm.load(tmp_path / "out").predict({"hippocampus-mr": volumes[28]})
    assert mask.shape == scan.shape
    assert np.allclose(mask.affine, scan.affine)
    assert np.array_equal(mask.dataobj, nibabel.load(tmp_path / "out" / "masks" / "0001.nii.gz").dataobj)
