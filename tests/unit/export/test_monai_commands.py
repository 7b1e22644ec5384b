"""MONAI's own commands on a bundle, typed as its README says, in its folder."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from panfm.data.cache import open_store
from panfm.evaluate.embed import embed_store, load_model
from panfm.export.formats import export_run

SCHEMA = Path(__file__).with_name("monai_schema.json")
CONFIGS = ["--meta_file", "configs/metadata.json", "--config_file", "configs/inference.json"]
WITHOUT_PANFM = """
import runpy, sys
sys.path.insert(0, "")
sys.modules["panfm"] = None
sys.argv = ["monai.bundle", *sys.argv[1:]]
runpy.run_module("monai.bundle", run_name="__main__")
"""


@pytest.fixture
def bundle(tmp_path, make_run, write_run):
    export_run(write_run(make_run()), "monai-bundle", tmp_path / "bundle", streams=["brain-mr", "heart-ct"])
    return tmp_path / "bundle"


def call(folder, *words):
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.long
def test_monai_verifies_the_bundle_where_panfm_is_not_installed(bundle):
    metadata = ["--meta_file", "configs/metadata.json", "--filepath", str(SCHEMA)]
    for words in (["verify_metadata", *metadata], ["verify_net_in_out", "network", *CONFIGS]):
        status, text = call(bundle, "-c", WITHOUT_PANFM, *words)
        assert status == 0, text
        assert "with no error" in text


@pytest.mark.slow
def test_monai_refuses_metadata_that_lack_something(bundle):
    from monai.bundle import verify_metadata  # five CPU-seconds

    path = bundle / "configs" / "metadata.json"
    schema = {"filepath": SCHEMA, "hash_val": hashlib.sha256(SCHEMA.read_bytes()).hexdigest(), "hash_type": "sha256"}
    verify_metadata(meta_file=path, **schema)
    broken = json.loads(path.read_text())
    del broken["network_data_format"]["inputs"]["heart-ct"]["dtype"]
    path.write_text(json.dumps(broken))
    with pytest.raises(ValueError, match="'dtype' is a required property"):
        verify_metadata(meta_file=path, **schema)


@pytest.mark.slow
def test_monai_runs_the_bundle_on_scans(tmp_path, bundle, write_site):
    site = write_site(tmp_path / "site", "clinic", ("brain",))
    patients = [{"brain-mr": str(site / f"clinic-{number}-brain.nii.gz")} for number in range(6)]
    (bundle / "patients.json").write_text(json.dumps([*patients, {}]))
    status, text = call(bundle, "-m", "monai.bundle", "run", *CONFIGS)
    assert status == 0, text
    model, run = load_model(tmp_path / "run" / "model")
    store = open_store(site, run.streams)
    found = np.load(bundle / "embeddings.npy")
    assert len(found) == 7
    np.testing.assert_allclose(found[:6], embed_store(model, store, range(6)), atol=1e-5)
