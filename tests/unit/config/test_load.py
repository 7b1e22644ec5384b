import hashlib
import tomllib
from pathlib import Path

import pytest
import tomli_w
from hypothesis import given, settings
from hypothesis import strategies as st

from panfm.config import SiteConfig, dump_toml, experiment_hash, load_run, load_site, parse_run, parse_site
from panfm.errors import ConfigError
from panfm.registry import BACKBONES

CONFIGS = Path(__file__).parents[3] / "configs"

RUN = """
name = "run"
[streams]
brain-mr = { shape = [8, 8, 8], patch = [4, 4, 4], spacing-mm = [2.0, 2.0, 2.0] }
heart-xray = { shape = [8, 8], patch = [4, 4] }
"""
COHORT = """
[cohort]
kind = "phantom"
[cohort.sites]
folder = { organs = ["brain"], subjects = 3 }
"""


@pytest.fixture
def run_file(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(RUN + COHORT)
    return path


def complaints(call, *args):
    with pytest.raises(ConfigError) as caught:
        call(*args)
    return str(caught.value).splitlines()


RUNS = sorted([*CONFIGS.glob("experiments/*.toml"), *CONFIGS.glob("deployment/*.toml")])


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.name)
def test_every_shipped_run_loads_and_survives_a_round_trip(path):
    run = load_run(path)
    assert parse_run(dump_toml(run)) == run


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("sites/*.toml")), ids=lambda path: path.name)
def test_every_shipped_site_loads_and_survives_a_round_trip(path):
    site = parse_site(path.read_text(), path.name)
    assert parse_site(dump_toml(site)) == site


@pytest.mark.parametrize("name", ["", "model"])
def test_a_run_starts_from_a_run_folder_or_from_its_model(run_file, name):
    folder = run_file.parent / "before"
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "model.safetensors").write_bytes(b"weights")
    start = load_run(run_file, [f"start.model={folder / name}"]).start
    assert (start.model, start.public) == (str(folder / "model"), False)
    assert start.sha256 == hashlib.sha256(b"weights").hexdigest()


def test_shipped_files_are_found():
    assert (CONFIGS / "experiments/quickstart.toml").exists()
    assert list(CONFIGS.glob("sites/*.toml"))


def test_site_folder(tmp_path):
    (tmp_path / "site.toml").write_text('name = "a"\n[limits]\nmay-leave = ["updates", "counts"]\n')
    assert load_site(tmp_path).limits.may_leave == ("updates", "counts")
    assert complaints(load_site, tmp_path / "none") == [
        f"{tmp_path}/none/site.toml: no such file, expected a TOML description"
    ]


TYPOS = {
    "trian.rounds=3": "trian: unknown key, did you mean train?",
    "train.ronuds=3": "train.ronuds: unknown key, did you mean train.rounds?",
    "train.local_steps=3": "train.local_steps: unknown key, did you mean train.local-steps?",
    "privacy.epsilon=1.0": "privacy: unknown key, did you mean patient-dp?",
    "server-privacy.epsilon=1.0": "server-privacy: unknown key, did you mean site-dp?",
    "objective.bta=1.0": "objective.bta: unknown key, did you mean objective.beta?",
    "objective.nmae='dino'": "objective.nmae: unknown key, did you mean objective.name?",
    "streams.brain-mr.shap=[8]": "streams.brain-mr.shap: unknown key, did you mean streams.brain-mr.shape?",
    "probe.zzz=3": "probe.zzz: unknown key, known: bootstrap, few-draws, few-labels, lda-shrinkage, missing-draws, "
    "personal-steps, tasks",
}


@pytest.mark.parametrize("override", TYPOS)
def test_typo_names_the_dotted_key_and_the_nearest_known_one(run_file, override):
    assert complaints(load_run, run_file, [override]) == [f"{run_file}: {TYPOS[override]}"]


BAD_VALUES = {
    "train.rounds=0": "train.rounds: found 0, expected a number above 0",
    "train.rounds=1.5": "train.rounds: found 1.5, expected a whole number",
    "train.rounds=true": "train.rounds: found true, expected a whole number",
    "train.learning-rate=nan": "train.learning-rate: found nan, expected a finite number",
    "train.learning-rate=inf": "train.learning-rate: found inf, expected a finite number",
    "masking.ratio=1.0": "masking.ratio: found 1.0, expected a number below 1.0",
    "train.rounds=2000000": "train.rounds: found 2000000, expected a number of at most 1000000",
    "train.learning-rate=0.0": "train.learning-rate: found 0.0, expected a number of at least 1e-09",
    "train.learning-rate='fast'": "train.learning-rate: found 'fast', expected a number",
    "train.betas=0.9": "train.betas: found 0.9, expected a list",
    "train.betas=[0.9]": "train.betas.1: missing, expected a value",
    "streams.brain-mr.shape=[8]": "streams.brain-mr.shape: found [8], expected at least 2 entries",
    "streams.brain-mr.shape=[8, 8, 8, 8]": "streams.brain-mr.shape: found [8, 8, 8, 8], expected at most 3 entries",
    "streams.brain-mr.channels=2": "streams.brain-mr.channels: found 2, expected one of 1, 3",
    "train=3": "train: found 3, expected a table",
    "streams=3": "streams: found 3, expected a table",
    "model.size='huge'": "model.size: found 'huge', expected one of nano, tiny, small, base, large",
    "federation={min-sites=true}": "federation.min-sites: found true, expected a whole number",
    "objective.standardise=1": "objective.standardise: found 1, expected true or false",
    "name={}": "name: found a table, expected text",
    "name=''": "name: found '', expected text that matches ^[a-z0-9][a-z0-9._-]{0,63}$",
    "start.model=''": "start.model: found '', expected at least 1 characters",
    "objective.name='jepa'": (
        "objective.name: found 'jepa', expected one of latent, dino, mae, views, view-regression, supervised"
    ),
    "objective.name=3": (
        "objective.name: found 3, expected one of latent, dino, mae, views, view-regression, supervised"
    ),
    "objective=3": "objective: found 3, expected a table",
    "masking.policy='rando'": (
        "masking.policy: found 'rando', expected one of random, organ, sgm, inverse, static, did you mean 'random'?"
    ),
    "masking.policy=3": "masking.policy: found 3, expected text",
    "streams.brain-mr.patch=[3, 4, 4]": "streams.brain-mr: patch [3, 4, 4] does not divide shape [8, 8, 8], "
    "[2, 4, 4] does",
    "streams.brain-mr.patch=[4, 4]": "streams.brain-mr: patch has 2 axes, shape has 3",
    "streams.heart-xray.spacing-mm=[1.0, 1.0]": "streams.heart-xray: spacing-mm: only for volumes",
    "organs=['heart']": "streams.brain-mr: organ 'brain' is not in organs ['heart'], add it or leave organs out",
    "train.betas=[0.9, 1.0]": "train.betas.1: found 1.0, expected a number below 1.0",
    "masking.policy='static'": "masking.static-organs: no stream has organ 'adipose', expected ['brain', 'heart']",
    "masking.static-organs=['haert']": (
        "masking.static-organs: no stream has organ 'haert', expected ['brain', 'heart']"
    ),
    "train.rounds": "override 'train.rounds': expected key=value, e.g. train.rounds=3",
    "=3": "override '=3': expected key=value, e.g. train.rounds=3",
    "cohort=3": "cohort: found 3, expected a table",
    "cohort.made={ on = [1, 1979-05-27] }": "cohort: made.on.1: found datetime.date(1979, 5, 27), expected text, "
    "a finite number, true, false, list or table",
    "cohort.seed=nan": "cohort: seed: found nan, expected text, a finite number, true, false, list or table",
    "name.first=3": "override 'name.first=3': name is a value, not a table",
}


@pytest.mark.parametrize("override", BAD_VALUES)
def test_bad_value(run_file, override):
    (line,) = complaints(load_run, run_file, [override])
    assert line.removeprefix(f"{run_file}: ") == BAD_VALUES[override]


def test_a_value_that_is_missing_is_named():
    assert complaints(parse_run, RUN.replace('name = "run"', "")) == [
        "run description: name: missing, expected a value"
    ]


def test_bad_stream_name():
    (line,) = complaints(parse_run, RUN.replace("brain-mr", "brain-mri"))
    assert "stream 'brain-mri': expected <organ>-<modality>" in line


def test_every_fault_has_its_line(run_file):
    faults = ["train.rounds=0", "seed=x", "extra=1", "objective.name='jepa'", "masking.policy='none'"]
    assert len(complaints(load_run, run_file, faults)) == 5


def test_keys_of_an_objective_are_those_of_the_one_that_is_named(run_file):
    [line] = complaints(load_run, run_file, ["objective.name=dino", "objective.prototype=8"])
    assert line == f"{run_file}: objective.prototype: unknown key, did you mean objective.prototypes?"
    [line] = complaints(load_run, run_file, ["objective.name=mae", "objective.beta=1.0"])
    assert line == f"{run_file}: objective.beta: unknown key, known: name"
    [line] = complaints(load_run, run_file, ["objective.name=dino", "objective.prototypes=0"])
    assert line == f"{run_file}: objective.prototypes: found 0, expected a number above 0"


def test_overrides(run_file):
    run = load_run(
        run_file, ["seed=4", "name=plain-text", "train.betas=[0.5, 0.6]", "objective.beta=2.0", " seed = 5 "]
    )
    assert (run.seed, run.name, run.train.betas) == (5, "plain-text", (0.5, 0.6))
    assert (run.objective.name, run.objective.beta) == ("latent", 2.0)
    assert load_run(run_file, ["objective.name=dino"]).objective.name == "dino"


def test_files_that_are_no_toml(tmp_path):
    for content in (b"\xff\xfe", b"name = ", b"a = " + b"[" * 9999, b"seed = " + b"9" * 9999):
        (tmp_path / "run.toml").write_bytes(content)
        assert len(complaints(load_run, tmp_path / "run.toml")) == 1
    assert complaints(load_run, tmp_path) == [
        f"{tmp_path}: cannot be read as UTF-8 text (IsADirectoryError: Is a directory)"
    ]


def test_hash_follows_the_content():
    run = parse_run(RUN)
    assert experiment_hash(run) == experiment_hash(parse_run("# a comment\n" + RUN))
    assert experiment_hash(run) != experiment_hash(parse_run("seed = 1\n" + RUN))


def test_organs_follow_from_the_streams_and_only_an_override_is_written():
    run = parse_run(RUN.replace("heart-xray", "skin-photo"))
    assert run.organs == ("brain", "skin", "heart", "adipose", "liver", "kidney", "spleen", "pancreas")
    assert "organs" not in tomllib.loads(dump_toml(run))
    named = parse_run('organs = ["brain", "heart", "eye"]' + RUN)
    assert named.organs == ("brain", "heart", "eye")
    assert tomllib.loads(dump_toml(named))["organs"] == ["brain", "heart", "eye"]
    assert parse_run(dump_toml(named)) == named
    assert experiment_hash(named) != experiment_hash(parse_run(RUN))


def test_descriptions_do_not_change():
    with pytest.raises(ValueError, match="frozen"):
        SiteConfig(name="a").name = "b"


KEYS = ["seed", "name", "organs", "streams", "cohort", "cohort.kind", "cohort.sites", "model.size", "objective",
        "objective.name", "objective.beta", "masking.ratio", "train", "train.betas", "train.rounds", "streams.brain-mr",
        "streams.brain-mr.shape", "streams.brain-mr.channels", "streams.x", "probe.bootstrap", "a\nb"]  # fmt: skip
SCALARS = st.booleans() | st.integers() | st.integers(10**300, 10**320) | st.floats() | st.text(max_size=8)
VALUES = st.recursive(
    SCALARS | st.dates(),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from([*KEYS, "kind", "shape"]), inner, max_size=3)
    ),
    max_leaves=6,
)


@settings(max_examples=200)
@given(st.sampled_from(KEYS), VALUES, st.booleans())
def test_any_toml_value_is_taken_or_refused_in_lines(run_file, key, value, as_override):
    try:
        text = tomli_w.dumps({"value": value}).removeprefix("value = ").strip()
    except ValueError:  # lone surrogates have no TOML
        return
    for line in complaints_about(run_file, key, value, text if as_override else None):
        assert ": " in line


def complaints_about(run_file, key, value, text):
    try:
        if text is None:
            parse_run(tomli_w.dumps({"name": "run", "streams": {}, key: value}))
        else:
            load_run(run_file, [f"{key}={text}"])
    except ConfigError as error:
        return str(error).splitlines()
    return []


@settings(max_examples=200)
@given(st.text(max_size=40))
def test_any_text_is_taken_or_refused(text):
    for parse in (parse_run, parse_site):
        with pytest.raises(ConfigError):
            parse(text)


def test_experts_per_block_are_one_number_or_a_list():
    table = '[model]\nbackbone = "director-experts"\n[model.experts]\ncount = [8, 4]\nactive = 3\n'
    run = parse_run(RUN + table)
    assert (run.model.experts.count, run.model.experts.active) == ((8, 4), (3,))
    assert parse_run(dump_toml(run)) == run


@pytest.mark.parametrize("faulty", ["count = 0", "count = true", "count = []", "counts = 4", "balance-weight = 0.1"])
def test_faulty_experts_are_named(faulty):
    first = complaints(parse_run, f"{RUN}[model.experts]\n{faulty}\n")[0]
    assert first.startswith(f"run description: model.experts.{faulty.split()[0]}")


@pytest.mark.parametrize("group", ["stream:haert-mr", "experts", "director"])
def test_a_group_that_does_not_travel_has_no_mean_of_its_own(run_file, group):
    with pytest.raises(ConfigError, match=f"sharing.groups: '{group}' does not travel"):
        load_run(run_file, [f'sharing.groups={{"{group}" = {{ mean = "median" }}}}'])


@pytest.mark.parametrize("experts", ["private", "pooled"])
def test_groups_of_a_backbone_that_is_registered_travel(experts):
    """A backbone of another name with directors has their settings too."""
    backbone = type("Exchanged", (BACKBONES.load("director-experts"),), {})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BACKBONES, "_targets", dict(BACKBONES._targets))
        BACKBONES.register("exchanged", backbone)
        text = f'{RUN}[model]\nbackbone = "exchanged"\n[sharing]\nexperts = "{experts}"\n'
        text += '[sharing.groups.%s]\nmean = "median"\n'
        assert parse_run(text % "director").sharing.mean_of("director") == "median"
        if experts == "pooled":
            assert parse_run(text % "router").sharing.mean_of("router") == "median"
        else:
            with pytest.raises(ConfigError, match="'router' does not travel"):
                parse_run(text % "router")


def test_an_unknown_mean_is_told_by_the_groups_own_key():
    (line,) = complaints(parse_run, RUN + '[sharing.groups.head]\nmean = "medain"\n')
    assert line.startswith("run description: sharing.groups.head.mean: found 'medain', expected one of weighted, ")
    assert line.endswith("did you mean 'median'?")


def test_a_suffix_needs_quotes_and_messages_show_them(run_file):
    table = "{ spacing-mm = [2.0, 2.0, 2.0], shape = [8, 8, 8], patch = [4, 4, 4] }"
    text = f'name = "run"\n[streams]\n"brain-mr.t1" = {table}\n"brain-mr.flair" = {table}\n'
    run = parse_run(text)
    assert list(run.streams) == ["brain-mr.t1", "brain-mr.flair"]
    assert run.organs[0] == "brain"
    assert parse_run(dump_toml(run)) == run
    lines = complaints(parse_run, text.replace('"brain-mr.t1"', "brain-mr.t1"))
    expected = 'streams.brain-mr.t1: a table in a stream, expected [streams."brain-mr.t1"], in quotes'
    assert f"run description: {expected}" in lines
    (line,) = complaints(parse_run, text.replace("patch = [4, 4, 4]", "patch = [3, 4, 4]", 1))
    assert line.startswith('run description: streams."brain-mr.t1": patch [3, 4, 4] does not divide')
    (line,) = complaints(parse_run, text.replace("[streams]", 'organs = ["heart"]\n[streams]'))
    assert "streams.\"brain-mr.t1\": organ 'brain' is not in organs" in line
    run_file.write_text(text)
    changed = load_run(run_file, ['streams."brain-mr.t1".patch=[8, 8, 8]'])
    assert [stream.patch for stream in changed.streams.values()] == [(8, 8, 8), (4, 4, 4)]
