"""The reference pages name every file of a run and of a site, and every key of the files that people read."""

import json
import re
from collections.abc import Iterable, Mapping
from functools import reduce
from pathlib import Path

import numpy as np
import pytest

from panfm.evaluate.embed import Features, write_features
from panfm.evaluate.probe_file import FILE as PROBES
from panfm.evaluate.result import ProbeResult
from panfm.finetune.fine_tuning import CHECKPOINT
from panfm.finetune.finetune_settings import SETTINGS_FILE
from panfm.finetune.task_description import HEAD_FILE, TASK_FILE
from panfm.finetune.task_result import RESULT_FILE
from panfm.models.whitening import FILE as WHITENING
from panfm.outputs import read_json_lines
from panfm.privacy.ledger import ANCHOR
from panfm.privacy.ledger import FILE as LEDGER
from panfm.report.report_data import FILE as REPORT_DATA
from panfm.site.audit_log import FILE as AUDIT_LOG
from server.expected_sites import FILE as EXPECTED_SITES
from server.run_folder import ENDED, LOCK
from simulations.documents import file_page
from tests.federation.conftest import GATED, SUMMED, TASKS


@pytest.fixture
def run_folder(labelled) -> Path:
    return labelled.run("run", *SUMMED, TASKS, GATED, "train.rounds=1")


def untold(paths: Iterable[str], entries: Mapping[str, str]) -> list[str]:
    """Paths and keys that match no entry of the reference."""
    signs = {r"\*\*": ".*", r"\*": "[^/]*"}
    patterns = []
    for entry in entries:
        pattern = re.sub(r"<[^>]*>", "[^/]+", re.escape(entry).replace("\\ ", " "))
        patterns.append(re.compile(reduce(lambda text, sign: text.replace(*sign), signs.items(), pattern)))
    return sorted(path for path in paths if not any(pattern.fullmatch(path) for pattern in patterns))


def files_of(folder: Path) -> list[str]:
    return [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]


def test_every_file_and_key_of_a_run_has_an_entry(run_folder, labelled):
    files = files_of(run_folder)
    assert untold(files, file_page.RUN_FOLDER) == []
    assert {"run.toml", "rounds.jsonl", "model/metadata.json", "model/probe.safetensors"} <= set(files)
    [line] = read_json_lines(run_folder / "rounds.jsonl")
    assert untold(line, file_page.ROUNDS) == []
    of_site = {f"sites.<site>.{key}" for site in line["sites"].values() for key in site}
    assert of_site == set(file_page.SITE_LINE)
    assert set(json.loads((run_folder / "sites.json").read_text())) == set(file_page.SITES_JSON)
    metadata = json.loads((run_folder / "model" / "metadata.json").read_text())
    assert set(file_page.METADATA) - set(metadata) <= {"whitening"}
    assert untold(metadata, file_page.METADATA) == []
    for site in sorted(labelled.sites.iterdir()):
        own = [path for path in files_of(site) if not path.endswith(".nii.gz")]
        own += [f".panfm/state/{path}" for path in files_of(run_folder / "sites" / site.name)]
        assert {".panfm/state/label-sums.digest", ".panfm/state/input-sums.digest"} <= set(own)
        assert untold(own, file_page.SITE_FOLDER) == []


def test_every_named_file_has_an_entry():
    """Checks the files that the run of the test above does not write."""
    for name in (
        EXPECTED_SITES,
        ENDED,
        LOCK,
        "start.safetensors",
        "frozen.safetensors",
        "flower.json",
        "status.html",
        "command.json",
        REPORT_DATA,
    ):
        assert name in file_page.RUN_FOLDER
    assert {f"model/{PROBES}", f"model/{WHITENING}"} <= set(file_page.RUN_FOLDER)
    tuned = {CHECKPOINT, SETTINGS_FILE, RESULT_FILE, f"model/{TASK_FILE}", f"model/{HEAD_FILE}"}
    assert tuned <= set(file_page.FINETUNE_FOLDER)
    named = {f".panfm/state/{ANCHOR}", f".panfm/ledger/{LEDGER}", f".panfm/state/{AUDIT_LOG}"}
    assert named <= set(file_page.SITE_FOLDER)


def test_every_key_of_probes_and_array_of_features_has_an_entry(tmp_path):

    assert set(ProbeResult.__dataclass_fields__) == set(file_page.PROBE)
    table = Features(("a",), ("test",), ("brain-mr",), np.ones((1, 1), dtype=bool), np.ones((1, 2)), "cls", "", ("1",))
    write_features(tmp_path / "features.npz", table)
    with np.load(tmp_path / "features.npz") as arrays:
        assert set(arrays) == set(file_page.FEATURES)


def test_a_file_without_an_entry_is_found():
    paths = ["run.toml", "other.bin", "tensorboard/x", "tensorboard/x/y", "sites/a/runs/b"]
    assert untold(paths, file_page.RUN_FOLDER) == ["other.bin", "tensorboard/x/y"]
