"""The `[cohort]` table of a run: a mistake in it is one line with its dotted key, told before any work."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from panfm.config import dump_toml, load_run, parse_run
from panfm.errors import ConfigError
from simulations.cohorts import COHORTS
from simulations.cohorts.prepare import WEIGHTS, cohort_of, load_simulation

CONFIGS = Path(__file__).parents[3] / "configs"
RUN = """
name = "run"
[streams]
brain-mr = { shape = [8, 8, 8], patch = [4, 4, 4], spacing-mm = [2.0, 2.0, 2.0] }
[cohort]
kind = "phantom"
[cohort.sites]
folder = { organs = ["brain"], subjects = 3 }
"""


@pytest.fixture
def run_file(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(RUN)
    return path


def complaints(call, *args):
    with pytest.raises(ConfigError) as caught:
        call(*args)
    return str(caught.value).splitlines()


EXPERIMENTS = sorted([*CONFIGS.glob("experiments/*.toml"), *CONFIGS.glob("deployment/*.toml")])


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.name)
def test_every_shipped_cohort_loads_and_survives_a_round_trip(path):
    run = load_simulation(path)
    assert parse_run(dump_toml(run)) == run
    assert cohort_of(parse_run(dump_toml(run))) == cohort_of(run)


def test_the_resolved_description_has_the_defaults(run_file):
    assert load_run(run_file).cohort == {"kind": "phantom", "sites": {"folder": {"organs": ["brain"], "subjects": 3}}}
    assert load_simulation(run_file, ["cohort.seed=4"]).cohort == {
        "kind": "phantom",
        "preset": "transient",
        "seed": 4,
        "holdout-subjects": 300,
        "sites": {"folder": {"organs": ["brain"], "subjects": 3, "age-shift": 0.0}},
    }


def test_a_description_that_its_defaults_make_too_large_is_told(run_file):
    """A run folder could not be read again."""
    sites = "".join(f'site-{number:05} = {{ organs = ["brain"], subjects = 3 }}\n' for number in range(1000))
    run_file.write_text(RUN + sites)
    [line] = complaints(load_simulation, run_file)
    assert line.startswith(f"{run_file}: with all defaults: more than 65536 bytes")


BAD_COHORTS = {
    "cohort.sites.folder.organ=3": "cohort.sites.folder.organ: unknown key, did you mean cohort.sites.folder.organs?",
    "cohort.sede=3": "cohort.sede: unknown key, did you mean cohort.seed?",
    "cohort={}": "cohort.kind: found nothing, expected one of phantom, modalities, real-images, "
    "real-modalities, folder",
    "cohort.kind=3": "cohort.kind: found 3, expected one of phantom, modalities, real-images, real-modalities, folder",
    "cohort.kind=fantom": "cohort.kind: found 'fantom', expected one of phantom, modalities, real-images, "
    "real-modalities, folder, did you mean 'phantom'?",
    "cohort.sites.folder.subjects=0": "cohort.sites.folder.subjects: found 0, expected a number above 0",
    "cohort.sites.folder.age-shift=inf": "cohort: sites.folder.age-shift: found inf, expected text, a finite number, "
    "true, false, list or table",
    "cohort.sites.holdout={organs=['brain'], subjects=3}": (
        "cohort: sites.holdout: the name of the held-out patients, expected another"
    ),
}


@pytest.mark.parametrize("override", BAD_COHORTS)
def test_a_mistake_in_a_cohort(run_file, override):
    assert complaints(load_simulation, run_file, [override]) == [f"{run_file}: {BAD_COHORTS[override]}"]


def test_every_fault_of_a_cohort_has_its_line(run_file):
    words = ["cohort.seed=x", "cohort.extra=1", "cohort.sites.folder.subjects=0"]
    assert len(complaints(load_simulation, run_file, words)) == 3


def test_a_mistake_is_told_without_torch(run_file):
    code = f"""
import sys
from pathlib import Path
from panfm.errors import ConfigError
from simulations.cohorts.prepare import load_simulation
for kind in {COHORTS.names!r}:
    try:
        load_simulation(Path({str(run_file)!r}), [f"cohort.kind={{kind}}", "cohort.sede=3"])
    except ConfigError as error:
        assert "cohort.sede: unknown key" in str(error), error
    else:
        raise AssertionError(kind)
assert not {{"torch", "monai"}} & set(sys.modules)
"""
    root = Path(__file__).parents[3]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=False)
    assert done.returncode == 0, done.stderr


STREAMS_COHORT = """
name = "pictures"
organs = ["chest", "skin"]
[cohort]
kind = "{kind}"
held-out = ["skin-photo"]
[cohort.sites]
a = {{ streams = ["chest-xray"]{subjects} }}
[streams]
chest-xray = {{ shape = [8, 8], patch = [4, 4] }}
chest-ct = {{ shape = [8, 8], patch = [4, 4] }}
skin-photo = {{ shape = [8, 8], patch = [4, 4], channels = 3 }}
"""


@pytest.mark.parametrize("kind", ["modalities", "real-modalities"])
@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("cohort.sites.a.streams=['skin-photo']", "sites.a.streams: 'skin-photo' is held out, expected no site"),
        ("cohort.sites.a.streams=['chest-mr']", "stream 'chest-mr' is not in streams ["),
        ("cohort.held-out=['skin-mr']", "stream 'skin-mr' is not in streams ["),
    ],
)
def test_streams_of_a_cohort(tmp_path, kind, override, complaint):
    path = tmp_path / "run.toml"
    path.write_text(STREAMS_COHORT.format(kind=kind, subjects=", subjects = 4" if kind == "modalities" else ""))
    assert cohort_of(load_simulation(path)).named_streams == ("chest-xray", "skin-photo")
    (line,) = complaints(load_simulation, path, [override])
    assert complaint in line


def test_a_real_modality_is_at_one_place(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(STREAMS_COHORT.format(kind="real-modalities", subjects=""))
    for name in ("chest-xray", "skin-xray"):
        (line,) = complaints(load_simulation, path, [f"cohort.sites.b={{ streams = ['{name}'] }}"])
        assert "modality 'xray' stands at two places, expected one" in line


def test_a_run_starts_from_weights_as_its_cohort_says(tmp_path, nano_weights):
    path = tmp_path / "run.toml"
    path.write_text(STREAMS_COHORT.format(kind="real-modalities", subjects=""))
    weights = os.environ[WEIGHTS]
    assert load_simulation(path, weights=weights) == load_simulation(path)
    changes = 'cohort.with-weights=["train.parts=norms", "train.rounds=3"]'
    plain, started = (load_simulation(path, [changes], weights=named) for named in (None, weights))
    assert plain.start is None
    assert (started.start.model, started.train.parts.kind, started.train.rounds) == (weights, "norms", 3)
    assert load_simulation(path, [changes, "train.rounds=1"], weights=weights).train.rounds == 1
    own = load_simulation(path, [changes, f"start.model={weights}", "train.parts=all"], weights="elsewhere")
    assert (own.start.model, own.train.parts.kind) == (weights, "all")


def test_the_shipped_pictures_start_from_public_weights_where_the_environment_names_them(nano_weights):
    run = load_simulation(CONFIGS / "experiments/real-pictures.toml", weights=os.environ[WEIGHTS])
    assert (run.start.public, run.train.parts.kind, run.features.layers) == (True, "last-blocks", (8, 10, 12))
    assert {(stream.shape, stream.patch) for stream in run.streams.values()} == {((84, 84), (14, 14))}


def test_the_held_out_patients_name_is_no_sites(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(STREAMS_COHORT.format(kind="real-modalities", subjects=""))
    (line,) = complaints(load_simulation, path, ["cohort.sites.holdout={ streams = ['chest-ct'] }"])
    assert "sites.holdout: the name of the held-out patients" in line
