"""Real scans: seven organs through check, cache, tokenizers, a training step and `panfm embed`; all others checked.

The images lie outside the repository, at $PANFM_REAL_DATA.
"""

import csv
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from panfm.anatomy import DEFAULT_ORGANS, parse_stream
from panfm.cli import main
from panfm.config import RunConfig, StreamConfig, dump_toml
from panfm.config.model import ModelConfig
from panfm.config.training import TrainConfig
from panfm.data.cache import open_store
from panfm.data.check import check_site
from panfm.errors import DataError
from panfm.evaluate.embed import embed_store, read_features
from panfm.models import PanModel
from panfm.training.trainer import Trainer

REAL = os.environ.get("PANFM_REAL_DATA")
pytestmark = pytest.mark.skipif(not REAL, reason="PANFM_REAL_DATA is not set: no real images")

VOLUME = StreamConfig(shape=(16, 16, 16), patch=(8, 8, 8), spacing_mm=(6.0, 6.0, 6.0))
PICTURE = StreamConfig(shape=(32, 32), patch=(8, 8))
BODY_PART = {
    "ct": "abdomen",
    "mr": "brain",
    "xray": "chest",
    "ultrasound": "breast",
    "pet": "body",
    "pathology": "blood",
}


def write_site(folder, rows):
    folder.mkdir()
    (folder / "site.toml").write_text('name = "real"\n')
    with (folder / "manifest.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("subject", "stream", "path", "split", "mask"), *rows])
    return folder


def table(name):
    with (Path(REAL) / name / "manifest.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def assert_sound(folder, streams, num_rows, blank=()):
    """All rows are sound but the blank ones; the store holds all."""
    report = check_site(folder, streams, organs={parse_stream(stream)[0] for stream in streams})
    assert [Path(fault.file).name for fault in report.faults] == list(blank)
    assert all("one value all over" in str(fault) for fault in report.faults)
    assert len(report.rows) == num_rows - len(blank)
    if blank:
        with pytest.raises(DataError, match=rf"{blank[0]}: found one value all over .* --quarantine leaves it out"):
            open_store(folder, streams)
        (folder / "site.toml").write_text('name = "real"\nconstant-images = "take"\n')
    store = open_store(folder, streams)
    assert sum(len(images) for images in store.images.values()) == num_rows
    for stream, images in store.images.items():
        values = np.asarray(images)
        assert values.min() >= 0, stream
        assert values.max() <= 1, stream
        shows_something = values.std(axis=tuple(range(1, values.ndim))) > 0.01
        assert shows_something.mean() > 0.95, stream  # one of the pictures is blank
    return store


@pytest.mark.slow
@pytest.mark.parametrize("tokenizer", ["statistics", "patch"])
def test_all_seven_organs(tmp_path, tokenizer):
    root = Path(REAL) / "organs3d"
    rows = [
        (
            line["subject"],
            f"{line['organ']}-{line['modality']}",
            root / line["file"],
            "",
            line["mask"] and root / line["mask"],
        )
        for line in table("organs3d")
        if line["organ"] in DEFAULT_ORGANS
    ]
    streams = dict.fromkeys((stream for _, stream, *_ in rows), VOLUME)
    folder = write_site(tmp_path / "site", rows)
    store = assert_sound(folder, streams, len(rows))
    assert {parse_stream(stream)[0] for stream in store.images} == set(DEFAULT_ORGANS)
    train = TrainConfig(rounds=1, local_steps=1, batch_size=len(store.subjects), warmup=0.0)
    run = RunConfig(name="real", streams=streams, model=ModelConfig(tokenizer=tokenizer), train=train)
    model = assert_one_step_moves_every_stream(run, store)
    assert_embeds(model, run, folder, tmp_path)


def assert_one_step_moves_every_stream(run, store) -> PanModel:
    trainer = Trainer(run)
    before = {name: tensor.clone() for name, tensor in trainer.shared_state().items()}
    result = trainer.train(store, store.indices("train"), first_step=0, num_steps=1, site="real", round_number=1)
    assert (result.num_steps, result.num_skipped) == (1, 0)
    assert np.isfinite(result.loss)
    after = trainer.shared_state()
    assert all(torch.isfinite(tensor).all() for tensor in after.values())
    for stream in run.streams:
        mine = [name for name in before if name.startswith(f"streams.{stream}.")]
        assert any(not torch.equal(before[name], after[name]) for name in mine), stream
    return trainer.model


def assert_embeds(model, run, folder, scratch):
    """`panfm embed` gives every subject finite features, the same as in this process."""
    (scratch / "model").mkdir()
    save_file(model.state_dict(), scratch / "model" / "model.safetensors")
    (scratch / "model" / "run.toml").write_text(dump_toml(run))
    words = ["embed", str(scratch / "model"), str(folder), "--out", str(scratch / "features.npz")]
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 0, done.output
    table = read_features(scratch / "features.npz")
    store = open_store(folder, run.streams)
    assert tuple(table.subjects) == store.subjects
    assert np.isfinite(table.features).all()
    np.testing.assert_array_equal(table.features, embed_store(model, store, np.arange(len(store.subjects))))
    assert table.features.std(axis=0).max() > 0.01  # subjects differ


@pytest.mark.slow
def test_hippocampus_volumes_and_masks(tmp_path):
    root = Path(REAL) / "hippocampus"
    scans = sorted((root / "images").iterdir())[::4]
    rows = [(scan.name[:-7], "hippocampus-mr", scan, "", root / "labels" / scan.name) for scan in scans]
    assert_sound(write_site(tmp_path / "site", rows), {"hippocampus-mr": VOLUME}, len(scans))


def test_pictures_of_six_modalities(tmp_path):
    root = Path(REAL) / "modality2d"
    rows = [
        (line["file"], f"{BODY_PART[line['modality']]}-{line['modality']}", root / line["file"], line["split"], "")
        for line in table("modality2d")[::5]
    ]
    streams = dict.fromkeys((stream for _, stream, *_ in rows), PICTURE)
    assert len(streams) == 6
    assert_sound(write_site(tmp_path / "site", rows), streams, len(rows), blank=["CT_0190.jpg"])


def test_whole_bodies(tmp_path):
    root = Path(REAL) / "organs3d/whole"
    rows = [
        (
            f"TS-{m}1",
            f"abdomen-{m}",
            root / f"TS-{m}1_{m.upper()}.nii.gz",
            "",
            root / f"TS-{m}1_{m.upper()}_labels.nii.gz",
        )
        for m in ("ct", "mr")
    ]
    store = assert_sound(write_site(tmp_path / "site", rows), {"abdomen-ct": VOLUME, "abdomen-mr": VOLUME}, 2)
    assert not np.array_equal(store.images["abdomen-ct"], store.images["abdomen-mr"])
