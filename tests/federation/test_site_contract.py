"""A simulated pre-training run ends with a sentence per site on which model to keep."""

import numpy as np
import pytest

from panfm.config import dump_toml, load_run
from panfm.evaluate.result import read_result
from panfm.models import build_model
from panfm.site.state import RUNS, StateStore
from simulations import finish
from tests.federation.test_engines import simulate
from tests.federation.test_task import _with_holdout


@pytest.mark.slow
@pytest.mark.long
def test_a_simulation_says_what_each_site_should_keep(labelled):
    """alpha holds nobody out; the one patient whom the others do cannot tell models apart."""
    cohort = _with_holdout(labelled)
    manifest = cohort / "sites" / "alpha" / "manifest.csv"
    manifest.write_text(manifest.read_text().replace(",val", ",train"))
    asked = ("train.rounds=1", "probe.personal-steps=1", "model.backbone=director-experts")
    done = simulate(labelled, "kept", "local", *asked)
    assert done.returncode == 0, done.stdout + done.stderr
    folder = labelled.folder / "kept"
    benefit = read_result(folder / "probe.json").benefit
    arms = {"site:alpha", "federated", "untrained", "personalised", "ensemble"}
    gains = {f"{arm} minus own" for arm in arms - {"site:alpha"}}
    assert {score.arm for score in benefit} == arms | gains
    assert {score.group for score in benefit} == {"site:alpha"}
    assert "alpha: " in done.stdout
    assert "What each site should keep" in (folder / "report.html").read_text()
    job = finish.AloneJob(dump_toml(load_run(folder / "run.toml")), cohort / "sites" / "alpha", folder)
    [path] = (folder / "sites" / "alpha" / RUNS).glob("*")
    kept, state = finish._kept_parameters(job), StateStore(path.parents[1], path.name).load(1)
    experts = {name for name in build_model(load_run(folder / "run.toml")).state_dict() if ".experts." in name}
    assert experts <= kept.keys()
    assert all(np.array_equal(kept[name], state[f"student.{name}"]) for name in kept)
