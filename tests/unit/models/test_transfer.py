"""A warm start holds what the run shares, to the name and the shape, or it is refused with one line."""

import hashlib

import numpy as np
import pytest
import safetensors.torch
import torch

from panfm.config import as_told, dump_toml, experiment_hash, load_run, parse_run
from panfm.errors import ConfigError, DataError
from panfm.models import PanModel, build_model
from panfm.models.private_part import load_with_fresh_private
from panfm.models.warm_start import read_start, start_state
from tests.conftest import SMALL_RUN


@pytest.fixture
def start(tmp_path, make_run):
    """Writes a model folder; returns the run that starts from it."""

    def write(change=lambda state: state, *, trained_by="", extra=""):
        before = make_run(trained_by)
        state = {name: value + 1.0 for name, value in build_model(before).state_dict().items()}
        (tmp_path / "model").mkdir(exist_ok=True)
        (tmp_path / "model" / "run.toml").write_text(dump_toml(before))
        content = safetensors.torch.save(change(state))
        (tmp_path / "model" / "model.safetensors").write_bytes(content)
        (tmp_path / "run.toml").write_text(f'{SMALL_RUN}{extra}\n[start]\nmodel = "{tmp_path}/model"\n')
        return load_run(tmp_path / "run.toml")

    return write


@pytest.mark.slow
def test_the_weights_come_back_and_are_known_by_their_hash(start):
    run = start()
    content = read_start(run)
    assert run.start.sha256 == hashlib.sha256(content).hexdigest()
    for name, value in build_model(run).state_dict().items():
        assert torch.equal(start_state(run, content)[name], value + 1.0), name


def test_sites_are_told_the_hash_and_not_the_place(start, tmp_path):
    run = start()
    told = dump_toml(as_told(run))
    assert run.start.sha256 in told
    assert str(tmp_path) not in told
    assert parse_run(told) == as_told(run)
    other = start(lambda state: {name: value * 2 for name, value in state.items()})
    assert experiment_hash(run) == experiment_hash(parse_run(told)) != experiment_hash(other)


def test_a_description_that_was_resolved_is_read_without_the_file(start, tmp_path):
    run = start()
    (tmp_path / "resolved.toml").write_text(dump_toml(run))
    (tmp_path / "model" / "model.safetensors").write_bytes(b"another")
    assert load_run(tmp_path / "resolved.toml") == run
    with pytest.raises(DataError, match=r"^start\.sha256: the weights have .*, expected " + run.start.sha256):
        read_start(run)


DEX = '[model]\nbackbone = "director-experts"\nexperts.count = 4\n'


@pytest.mark.parametrize("experts", ["private", "pooled"])
def test_director_experts_start_from_a_dense_model(start, make_run, experts):
    run = start(extra=f'{DEX}[sharing]\nexperts = "{experts}"\n')
    found = start_state(run, read_start(run))
    dense, seeded = build_model(make_run()).state_dict(), build_model(run).state_dict()
    assert any(".experts." in name for name in found) == (experts == "pooled")
    assert found.keys() == build_model(run).split_state(run.sharing)[0].keys()
    slots = {"weight_in": "0.weight", "bias_in": "0.bias", "weight_out": "2.weight", "bias_out": "2.bias"}
    for name, value in found.items():
        layer, _, slot = name.partition(".mlp.experts.")
        if slot:
            assert all(torch.equal(expert, dense[f"{layer}.mlp.{slots[slot]}"] + 1.0) for expert in value), name
        elif ".router." in name:
            assert torch.equal(value, seeded[name])
        else:
            assert torch.equal(value, dense[name.replace(".director", "")] + 1.0), name


def test_a_dense_model_of_another_size_starts_no_experts(start):
    with pytest.raises(DataError, match=r"has another \[model\], expected the run's"):
        read_start(start(extra=f"{DEX}hidden-multiple = 2\n"))
    with pytest.raises(DataError, match=r"^start\.model: holds no heads\.streams\.heart-ct\.hidden_query"):
        read_start(start(without, extra=DEX))
    with pytest.raises(DataError, match=r"has another \[model\], expected the run's"):
        read_start(start(trained_by=DEX))


def without(state):
    return {name: value for name, value in state.items() if "heart-ct" not in name}


def more(state):
    return state | {"heads.more": torch.zeros(2)}


def reshaped(state):
    return state | {"backbone.cls": torch.zeros(4)}


def whole_numbers(state):
    return state | {"backbone.cls": torch.zeros(48, dtype=torch.int64)}


def poisoned(state):
    return state | {"backbone.cls": torch.full((48,), np.nan)}


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (without, r"start\.model: holds no heads\.streams\.heart-ct\.hidden_query, which this run shares"),
        (more, r"start\.model: holds heads\.more, which this run does not share"),
        (reshaped, r"start\.model: backbone\.cls is torch\.float32 \[4\], expected float32 \[48\]"),
        (whole_numbers, r"start\.model: backbone\.cls is torch\.int64 \[48\], expected float32 \[48\]"),
        (poisoned, r"start\.model: backbone\.cls holds NaN or inf"),
    ],
)
def test_parameters_that_do_not_fit_are_refused(start, change, why):
    with pytest.raises(DataError, match=f"^{why}"):
        read_start(start(change))


def test_a_model_of_other_streams_or_size_is_refused(start, tmp_path):
    run = start()
    before = (tmp_path / "model" / "run.toml").read_text()
    (tmp_path / "model" / "run.toml").write_text(before.replace("spacing-mm = [\n    2.0,", "spacing-mm = [\n    3.0,"))
    with pytest.raises(DataError, match="was trained on another brain-mr, expected the run's streams"):
        read_start(run)
    with pytest.raises(DataError, match=r"has another \[model\], expected the run's"):
        read_start(start(extra='[model]\nsize = "tiny"\n'))
    with pytest.raises(DataError, match=r"holds heads\.predictor.*, which this run does not share"):
        read_start(start(extra='[sharing]\nhead = "private"\n'))


def test_what_cannot_be_read_is_named(start, tmp_path):
    run = start()
    for content in (b"", b"no tensors", b"\xff" * 16):
        (tmp_path / "model" / "model.safetensors").write_bytes(content)
        with pytest.raises(DataError, match=r"^start\.model: expected weights"):
            read_start(load_run(tmp_path / "run.toml"))
    (tmp_path / "model" / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"model\.safetensors cannot be read \(No such file or directory\)"):
        load_run(tmp_path / "run.toml")
    with pytest.raises(DataError, match=r"start\.model: missing"):
        read_start(as_told(run))


EXPERTS = (
    '[model]\nbackbone = "director-experts"\nexperts = {{ count = [2, 3], active = 1 }}\n[sharing]\nexperts = "{}"\n'
)
DIRECTORS_PART = {"weight_in": "0.weight", "bias_in": "0.bias", "weight_out": "2.weight", "bias_out": "2.bias"}


@pytest.fixture
def make_model(make_run):
    """A Director-Experts model in which every number has moved from its start, and its run."""

    def make(experts: str, extra: str = "") -> tuple[PanModel, object]:
        run = make_run(EXPERTS.format(experts) + extra)
        model = build_model(run)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for value in model.state_dict().values():
                value += torch.rand(value.shape, generator=generator)
        return model, run

    return make


def test_experts_are_the_directors_and_the_rest_is_seeded(make_model):
    trained, run = make_model("private", 'head = "private"\n')
    shared, private = trained.split_state(run.sharing)
    assert any(name.startswith("heads.") for name in private)
    model = build_model(run)
    seeded = {name: value.clone() for name, value in model.state_dict().items()}
    load_with_fresh_private(model, run.sharing, shared, seeded)
    found = model.state_dict()
    for name in private:
        layer, _, part = name.partition(".experts.")
        if part:
            director = trained.state_dict()[f"{layer}.director.{DIRECTORS_PART[part]}"]
            assert all(torch.equal(expert, director) for expert in found[name]), name
        else:
            assert torch.equal(found[name], seeded[name]), name
    assert all(torch.equal(found[name], value) for name, value in shared.items())


@pytest.mark.parametrize("experts", ["pooled", "naive"])
def test_what_is_shared_is_never_replaced(make_model, experts):
    trained, run = make_model(experts)
    model = build_model(run)
    load_with_fresh_private(model, run.sharing, trained.state_dict(), model.state_dict())
    assert all(torch.equal(found, value) for found, value in zip(
        model.state_dict().values(), trained.state_dict().values(), strict=True
    ))  # fmt: skip
