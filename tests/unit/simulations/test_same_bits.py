import json
import os
import secrets
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.numpy
from rich.console import Console
from typer.testing import CliRunner

from panfm.errors import ConfigError, DataError, RunError
from simulations.__main__ import app
from simulations.same_bits.command import compare_trees, show
from simulations.same_bits.comparison import PARTS, Allowances, RunFiles, compare
from simulations.same_bits.hooks import sitecustomize as hooks
from simulations.same_bits.runs import FIRST, RUNS, chosen
from simulations.same_bits.sides import ROOT, digest

DIGEST = b"0" * 64
WEIGHTS = np.array([1.0, 2.0, 4.0], np.float32)
STATE = Path("sites/alpha/runs/same-bits-0/round-000002.state")
CHECKPOINT = Path("checkpoint/round-000002.state")


def write_reply(folder: Path, node: int, kind: str, config: dict, weights=WEIGHTS):
    records = {"arrays": {"backbone": SimpleNamespace(numpy=lambda: weights)}} if kind == "train" else {}
    content = SimpleNamespace(
        array_records=records, metric_records={"metrics": {"loss": 0.5}}, config_records={"config": config}
    )
    metadata = SimpleNamespace(message_type=kind, src_node_id=node)
    hooks.record(SimpleNamespace(metadata=metadata, content=content, has_error=lambda: False), folder)


def write_states(folder: Path, teacher, backbone, *, profile=0.25):
    (folder / STATE).write_bytes(DIGEST + safetensors.numpy.save({"teacher": teacher}))
    words = json.dumps({"run-id": "same-bits-0", "profile": {"brain-mr": profile}}).encode()
    (folder / CHECKPOINT).write_bytes(DIGEST + words + b"\n" + safetensors.numpy.save({"global/backbone": backbone}))


def write_run(folder: Path) -> RunFiles:
    """A run as the engines leave one, of two rounds and one site."""
    files = RunFiles(folder, folder / "replies", (folder / "checkpoint", folder / "sites"))
    for path in (folder / "model", (folder / STATE).parent, folder / "checkpoint"):
        path.mkdir(parents=True)
    (folder / "model" / "model.safetensors").write_bytes(safetensors.numpy.save({"a": WEIGHTS, "b": WEIGHTS}))
    write_states(folder, WEIGHTS, WEIGHTS)
    lines = [{"round": number, "loss": 0.5 / number, "seconds": 1.25, "sites": ["alpha"]} for number in (1, 2)]
    (folder / "rounds.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "probe.json").write_text('{"scores": [{"arm": "federated", "value": 0.75}]}')
    write_reply(files.replies, 7, "query", {"site": "alpha", "run": "[train]\nrounds = 2\n"})
    for number in (1, 2):
        write_reply(files.replies, 7, "train", {"round": number})
    return files


@pytest.fixture
def base(tmp_path):
    return write_run(tmp_path / "base")


@pytest.fixture
def here(tmp_path):
    return write_run(tmp_path / "here")


def told(base, here, allowances=None):
    """Part -> one line per file that differs, for the parts in which some do."""
    verdict = compare(base, here, allowances or Allowances())
    assert tuple(verdict) == PARTS
    return {part: [str(difference) for difference in found] for part, found in verdict.items() if found}


def rewrite(path: Path, old: bytes, new: bytes):
    content = path.read_bytes()
    assert old in content
    path.write_bytes(content.replace(old, new, 1))


def test_the_same_files_are_the_same(base, here):
    assert told(base, here) == {}


def test_one_flipped_bit_of_a_model_is_seen(base, here):
    content = bytearray((here.run_dir / "model" / "model.safetensors").read_bytes())
    content[-4] ^= 1  # the lowest bit of the last number, 4.0: half a millionth
    (here.run_dir / "model" / "model.safetensors").write_bytes(content)
    [line] = told(base, here)["model"]
    assert line == "model: model.safetensors: b: max abs difference 4.77e-07 (2 keys differ)"


def test_a_model_file_of_the_same_tensors_but_other_bytes_is_seen(base, here):
    tensors = {"a": WEIGHTS, "b": WEIGHTS}
    content = safetensors.numpy.save(tensors, metadata={"made-by": "someone"})
    (here.run_dir / "model" / "model.safetensors").write_bytes(content)
    [line] = told(base, here)["model"]
    assert line.startswith("model: model.safetensors: bytes: ")
    assert line.endswith("(2 keys differ)")


@pytest.mark.parametrize(
    ("old", "new", "story"),
    [
        (b'"loss": 0.25', b'"loss": 0.2500000000000001', "round 2.loss: 0.25 -> 0.2500000000000001, difference 1.1"),
        (b'"round": 2', b'"round": 2.0', "round 2.round: only in the base"),
        (b'"loss": 0.25', b'"loss": NaN', "round 2.loss: 0.25 -> nan"),
        (b'"loss": 0.5', b'"loss": -0.5', "round 1.loss: 0.5 -> -0.5, difference 1"),
        (b'["alpha"]', b"[]", "round 1.sites.0: only in the base"),
        (b'["alpha"]', b'["alpha", "beta"]', "round 1.sites.1: only in this tree"),
        (b'"sites"', b'"places"', "round 1.sites.0: only in the base"),
    ],
)
def test_a_change_in_the_rounds_is_seen(base, here, old, new, story):
    rewrite(here.run_dir / "rounds.jsonl", old, new)
    [line] = told(base, here)["rounds"]
    assert line.startswith(f"rounds: rounds.jsonl: {story}")


@pytest.mark.parametrize(("old", "new"), [("0.0", "-0.0"), ("1", "1.0"), ("true", "1"), ("null", "0"), ("[]", "{}")])
def test_numbers_that_are_equal_but_not_alike_differ(base, here, old, new):
    for files, value in ((base, old), (here, new)):
        (files.run_dir / "rounds.jsonl").write_text(f'{{"round": 1, "loss": {value}}}\n')
    assert list(told(base, here)) == ["rounds"]


def test_nan_is_the_same_as_nan(base, here):
    for files in (base, here):
        (files.run_dir / "rounds.jsonl").write_text('{"round": 1, "loss": NaN}\n')
    assert told(base, here) == {}


@pytest.mark.parametrize(
    ("changed", "story"),
    [
        (WEIGHTS[:2], "F32[3] -> F32[2]"),
        (WEIGHTS.astype(np.float64), "F32[3] -> F64[3]"),
        (WEIGHTS.reshape(3, 1), "F32[3] -> F32[3, 1]"),
        (WEIGHTS * 2, "max abs difference 4"),
        (np.array([1, 2, np.nan], np.float32), "max abs difference nan"),
    ],
)
def test_a_changed_tensor_of_a_state_is_seen(base, here, changed, story):
    write_states(here.run_dir, WEIGHTS, changed)
    assert told(base, here)["state"] == [f"state: {CHECKPOINT}: global/backbone: {story} (1 keys differ)"]
    write_states(here.run_dir, changed, WEIGHTS)
    assert told(base, here)["state"] == [f"state: {STATE}: teacher: {story} (1 keys differ)"]


def test_changed_words_of_a_state_are_seen(base, here):
    write_states(here.run_dir, WEIGHTS, WEIGHTS, profile=0.5)
    assert told(base, here)["state"] == [
        f"state: {CHECKPOINT}: words.profile.brain-mr: 0.25 -> 0.5, difference 0.25 (1 keys differ)"
    ]
    bound = safetensors.numpy.save({"teacher": WEIGHTS}, metadata={"run": "a hash"})
    write_states(here.run_dir, WEIGHTS, WEIGHTS)
    (here.run_dir / STATE).write_bytes(DIGEST + bound)
    assert told(base, here)["state"] == [f"state: {STATE}: metadata.run: only in this tree (1 keys differ)"]


@pytest.mark.parametrize(
    ("part", "path"),
    [
        ("model", "model/model.safetensors"),
        ("state", STATE),
        ("state", CHECKPOINT),
        ("rounds", "rounds.jsonl"),
        ("probe", "probe.json"),
        ("replies", "replies/last"),
    ],
)
@pytest.mark.parametrize("lacking", ["base", "here"])
def test_a_missing_file_is_seen(base, here, part, path, lacking):
    files = base if lacking == "base" else here
    last = sorted(files.replies.glob("*.npz"))[-1]
    (last if path == "replies/last" else files.run_dir / path).unlink()
    assert told(base, here)[part][0].count(f"only in {'this tree' if lacking == 'base' else 'the base'}") == 1


@pytest.mark.parametrize("path", ["replies", "model", "rounds.jsonl"])
def test_what_neither_side_left_is_not_the_same(base, here, path):
    for files in (base, here):
        target = files.run_dir / path
        shutil.rmtree(target) if target.is_dir() else target.unlink()
    with pytest.raises(DataError, match="neither side left any"):
        compare(base, here, Allowances())


def test_a_file_that_cannot_be_read_is_an_error(base, here):
    (here.run_dir / STATE).write_bytes(DIGEST + b"torn")
    with pytest.raises(DataError, match="state cannot be read"):
        compare(base, here, Allowances())


def test_of_several_replies_to_one_question_the_last_counts(base, here):
    write_reply(here.replies, 7, "train", {"round": 2}, WEIGHTS + 1)
    assert told(base, here)["replies"] == [
        "replies: alpha/train-2: arrays.arrays.backbone: max abs difference 1 (1 keys differ)"
    ]
    write_reply(here.replies, 7, "train", {"round": 2})
    assert told(base, here) == {}


def test_replies_are_told_apart_by_site_whatever_its_node(base, here):
    shutil.rmtree(here.replies)
    write_reply(here.replies, 12345, "query", {"site": "alpha", "run": "[train]\nrounds = 2\n"})
    for number in (1, 2):
        write_reply(here.replies, 12345, "train", {"round": number})
    assert told(base, here) == {}


def test_a_key_of_a_description_in_a_reply_is_named(base, here):
    write_reply(here.replies, 7, "query", {"site": "alpha", "run": "[train]\nrounds = 2\nthreads = 1\n"})
    [line] = told(base, here)["replies"]
    assert line.startswith("replies: alpha/query-0: reply.config.config.run.train.threads: only in this tree")


def test_only_what_is_declared_may_differ(base, here):
    entry = {"run": "*", "part": "rounds", "key": "rounds.jsonl: *.seconds", "reason": "time"}
    rewrite(here.run_dir / "rounds.jsonl", b'"seconds": 1.25', b'"seconds": 2.5')
    assert list(told(base, here)) == ["rounds"]
    assert list(told(base, here, Allowances((entry | {"part": "probe"},)))) == ["rounds"]
    allowances = Allowances((entry, {"run": "*", "part": "model", "key": "none", "reason": "stale"}))
    assert told(base, here, allowances) == {}
    assert (dict(allowances.met), allowances.unused()) == ({"time": 1}, ["stale"])
    rewrite(here.run_dir / "rounds.jsonl", b'"loss": 0.25', b'"loss": 0.125')
    assert list(told(base, here, allowances)) == ["rounds"]


def test_a_declaration_holds_for_the_runs_that_it_names():
    entry = {"run": "private*", "part": "model", "key": "*", "reason": "one more draw"}
    allowances = Allowances((entry,), (entry,))
    for run, number in (("private", 1), ("private-sites", 1), ("dex-private", 0)):
        assert len(allowances.of(run).differences) == len(allowances.of(run).renamed) == number
    assert allowances.of("private").allows("model", "model.safetensors: a")
    assert allowances.unused() == []


def test_a_renamed_key_keeps_its_value(base, here):
    entry = {"run": "*", "part": "rounds", "was": r"\.loss$", "now": ".training-loss", "reason": "plain words"}
    for number in (b"0.5", b"0.25"):
        rewrite(here.run_dir / "rounds.jsonl", b'"loss": ' + number, b'"training-loss": ' + number)
    assert list(told(base, here)) == ["rounds"]
    assert told(base, here, Allowances(renamed=(entry,))) == {}
    rewrite(here.run_dir / "rounds.jsonl", b'"training-loss": 0.25', b'"training-loss": 0.125')
    assert told(base, here, Allowances(renamed=(entry,)))["rounds"][0].startswith("rounds: rounds.jsonl: round 2.tr")


@pytest.mark.parametrize(
    "text",
    [
        '[[allowed]]\nrun = "*"\npart = "rounds"\nkey = "*"\n',
        '[[allowed]]\nrun = "*"\npart = "rounds"\nkey = "*"\nreason = " "\n',
        '[[allowed]]\nrun = "*"\npart = "round"\nkey = "*"\nreason = "time"\n',
        '[[allowed]]\npart = "rounds"\nkey = "*"\nreason = "time"\n',
        '[[renamed]]\nrun = "*"\npart = "rounds"\nwas = "a"\nreason = "words"\n',
        '[[alowed]]\nrun = "*"\npart = "rounds"\nkey = "*"\nreason = "time"\n',
    ],
)
def test_a_declaration_without_a_reason_or_a_known_part_is_refused(tmp_path, text):
    (tmp_path / "allowed.toml").write_text(text)
    with pytest.raises(ConfigError, match=r"allowed\.toml"):
        Allowances.read(tmp_path / "allowed.toml")


def test_the_declarations_of_this_repository_are_read():
    assert Allowances.read().differences[0]["reason"] == "wall-clock time"


def test_a_difference_ends_with_an_error_and_is_in_the_table(base, here, capsys):
    rewrite(here.run_dir / "rounds.jsonl", b'"loss": 0.25', b'"loss": 0.125')
    verdicts = {"toy": compare(base, here, Allowances())}
    with pytest.raises(RunError, match="1 of 1 runs differ: toy"):
        show(verdicts, Allowances(), Console(width=100))
    shown = capsys.readouterr().out
    assert "toy: rounds: rounds.jsonl: round 2.loss: 0.25 -> 0.125, difference 0.125 (1 keys differ)" in shown
    assert [word for word in shown.split() if word in ("same", "DIFFERS")] == [
        "same",
        "same",
        "DIFFERS",
        "same",
        "same",
    ]


def test_noise_and_names_of_others_stay_secret(monkeypatch):
    monkeypatch.setenv(hooks.SEEDED, "1")
    for module, is_ours in (
        ("panfm.privacy.randomness", True),
        ("server.rounds", True),
        ("panfmx", False),
        ("uuid", False),
    ):
        draws = []
        for _ in range(2):
            hooks.begin_run()
            caller = {"__name__": module, "hooks": hooks}
            draws.append(eval("hooks.urandom(16), hooks.token_hex(4)", caller))
        assert (draws[0] == draws[1]) is is_ours
    monkeypatch.setenv(hooks.SEEDED, "")
    hooks.begin_run()
    eval("hooks.urandom(16)", {"__name__": "panfm", "hooks": hooks})
    assert hooks.num_seeded_bytes == 0


def test_this_process_keeps_its_own_randomness():
    assert os.urandom is not hooks.urandom
    assert secrets.token_hex is not hooks.token_hex


def test_a_cohort_is_known_by_its_images_and_tables(tmp_path):
    site = tmp_path / "cohort" / "sites" / "alpha"
    (site / "images").mkdir(parents=True)
    (site / "images" / "a.nii.gz").write_bytes(b"image")
    before = digest(tmp_path / "cohort")
    (site / "site.toml").write_text("other limits")
    (site / ".panfm").mkdir()
    (site / ".panfm" / "cache").write_bytes(b"made by a run")
    assert digest(tmp_path / "cohort") == before
    (site / "images" / "a.nii.gz").write_bytes(b"imagf")
    assert digest(tmp_path / "cohort") != before


def test_runs_cover_objectives_and_maskings():
    overrides = "\n".join(override for run in RUNS for override in run.overrides)
    for name in ("dino", "mae", "organ", "sgm", "inverse", "static", "int8", "private", "pooled"):
        assert f'"{name}"' in overrides
    assert len({run.name for run in RUNS}) == len(RUNS)


def test_chosen_runs():
    assert [run.name for run in chosen(["int8-resumed"], quick=False)] == [
        FIRST.name,
        "int8",
        "int8-resumed",
    ]
    assert chosen([], quick=False) == list(RUNS)
    assert {run.engine for run in chosen([], quick=True)} == {"local"}
    assert [run.name for run in chosen(["deployment"], quick=True)] == [FIRST.name, "deployment"]


@pytest.mark.parametrize(
    ("words", "complaint"), [(["HEAD", "--only", "nothing"], "--only nothing"), (["no-such-commit"], "no-such-commit")]
)
def test_a_name_that_is_none_is_refused_before_work(words, complaint):
    done = CliRunner().invoke(app, ["same-bits", *words])
    assert isinstance(done.exception, ConfigError)
    assert complaint in str(done.exception)


@pytest.mark.slow
@pytest.mark.long
def test_a_tree_gives_the_same_bits_as_itself(tmp_path):
    runs = chosen(["private"], quick=True)
    verdicts = compare_trees(ROOT, ROOT, tmp_path, runs, Allowances.read(), Console(quiet=True))
    assert list(verdicts) == [FIRST.name, "private"]
    assert not any(differences for parts in verdicts.values() for differences in parts.values())
