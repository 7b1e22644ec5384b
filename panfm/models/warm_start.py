"""Warm starts: the shared part of a model that was trained before, or what public weights make of it.

A warm start is checked: the description names the file of weights by its hash; streams, model and every parameter must
be the run's own, since a model that fits by chance (another voxel size, another order of channels) would train on
without a word. A Director-Experts run may also start from a dense model of the same size; its routers are then as the
run's seed has them. A run with a task takes the encoder alone: its heads are as the seed has them.

Public weights are converted once, where the run folder is made (`public_weights.py`, `public_start.py`); what they
become is then known by the hashes of its groups.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from panfm.config import RunConfig, load_run
from panfm.errors import DataError
from panfm.models.low_rank import fit_lora
from panfm.models.packing import shared_hashes
from panfm.models.pan import PanModel, build_model, describe_model
from panfm.models.private_part import load_with_fresh_private
from panfm.models.public_start import check_public_fit, dense_state
from panfm.models.public_weights import read_public
from panfm.models.trained_parts import is_lora
from panfm.models.transfer import (
    HEADS,
    director_run,
    director_state,
    start_from_dense,
    taskless_state,
)
from panfm.sharing.groups import DIRECTOR


def read_start(run: RunConfig) -> bytes:
    """The shared parameters that a run starts from, as a weights file, checked: the own model's file that
    `run.start.model` names, or what public weights make of the run's shared part.

    Raises:
        ConfigError: the folder's `run.toml` is absent or does not hold.
        DataError: the weights are absent, or do not fit the run.
    """
    assert run.start is not None
    if run.start.model is None:
        raise DataError("start.model: missing, expected the folder of the model that start.sha256 tells of")
    folder = Path(run.start.model)
    if run.start.public:
        return _read_public_start(run, folder)
    before = load_run(folder / "run.toml")
    if differing := [name for name, stream in run.streams.items() if before.streams.get(name) != stream]:
        raise DataError(f"start.model: {folder} was trained on another {differing[0]}, expected the run's streams")
    if before.model != run.model and not _is_its_dense_model(before, run):
        raise DataError(f"start.model: {folder} has another [model], expected the run's")
    try:
        content = (folder / "model.safetensors").read_bytes()
    except OSError as error:
        raise DataError(f"start.model: {folder}/model.safetensors cannot be read ({error.strerror})") from error
    start_state(run, content)
    return content


def _read_public_start(run: RunConfig, path: Path) -> bytes:
    """The shared parameters that public weights make of a run, as a weights file."""
    assert run.start is not None
    public = read_public(path)
    _check_digest(public.sha256, run.start.sha256)
    check_public_fit(run, public)
    state = dense_state(run, public)
    model = describe_model(director_run(run) if describe_model(run).director_experts() else run)
    expected = {name: value for name, value in model.state_dict().items() if not name.startswith(HEADS)}
    _check_fit(state, {name: value for name, value in expected.items() if not is_lora(name)})
    return safetensors.torch.save(_with_experts(run, state))


def start_model(run: RunConfig) -> PanModel:
    """The model that a run starts from, at the machine of the server: as `build_model`, with its start loaded.

    Raises:
        ConfigError, DataError: as `read_start` does.
    """
    model = build_model(run)
    if run.start is not None:
        seeded = {name: value.clone() for name, value in model.state_dict().items()}
        load_with_fresh_private(model, run.sharing, start_state(run, read_start(run)), seeded)
    return model


def with_start_parameters(run: RunConfig, content: bytes) -> RunConfig:
    """The run with the hashes of what it starts from, group by group, by which sites know them.

    Raises:
        DataError: as `start_state` does.
    """
    assert run.start is not None
    hashes = _hashes(run, start_state(run, content))
    return run.model_copy(update={"start": run.start.model_copy(update={"parameters": hashes})})


def start_state(run: RunConfig, content: bytes) -> dict[str, Tensor]:
    """The shared parameters in a weights file, by name.

    Raises:
        DataError: it is not the file that the run's description tells of, or not what the run shares.
    """
    assert run.start is not None
    state = _read_state(run, content)
    expected, hashes = run.start.parameters, _hashes(run, state)
    if expected is not None and expected != hashes:
        groups = [group for group in sorted(hashes | expected) if hashes.get(group) != expected.get(group)]
        raise DataError(f"start.parameters: the weights have another {groups[0]}, expected the one of this hash")
    return state


def _hashes(run: RunConfig, state: Mapping[str, Tensor]) -> dict[str, str]:
    """Hash the groups of a run's shared parameters."""
    return shared_hashes(describe_model(run), run.sharing, state)


def _read_state(run: RunConfig, content: bytes) -> dict[str, Tensor]:
    assert run.start is not None
    if not run.start.public:  # what is made of public weights is known by `start.parameters`
        _check_digest(hashlib.sha256(content).hexdigest(), run.start.sha256)
    try:
        state = safetensors.torch.load(content)
    except (ValueError, SafetensorError) as error:
        raise DataError("start.model: expected weights as a run exports them") from error
    if run.task is not None:
        state = taskless_state(state, build_model(run).split_state(run.sharing)[0])
    model = describe_model(run)
    directors = {name for name, group in model.parameter_groups().items() if group == DIRECTOR}
    if directors and not directors & state.keys():
        dense = director_run(run)
        expected = describe_model(dense).split_state(dense.sharing)[0]
        _check_fit(state := fit_lora(state, expected), _without_lora(expected))
        return _with_experts(run, state)
    expected = model.split_state(run.sharing)[0]
    state = fit_lora(state, expected)
    if any(map(is_lora, expected)) and not any(map(is_lora, state)):
        _check_fit(state, _without_lora(expected))
        return _with_experts(run, state)
    _check_fit(state, expected)
    return state


def _check_digest(digest: str, expected: str | None) -> None:
    if digest != expected:
        raise DataError(f"start.sha256: the weights have {digest}, expected {expected}")


def _without_lora(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if not is_lora(name)}


def _is_its_dense_model(before: RunConfig, run: RunConfig) -> bool:
    """Whether the directors of a run's model alone make up such a model."""
    dense = before.model.model_copy(update={"experts": run.model.experts})
    return bool(describe_model(run).director_experts()) and dense == director_run(run).model


def _with_experts(run: RunConfig, dense: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Turn parameters of a dense model into the shared part of a run; what they do not hold is as the seed has it."""
    model = build_model(run)
    start_from_dense(model, director_state(model) | dict(dense))
    return model.split_state(run.sharing)[0]


def _check_fit(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Raises DataError at the first parameter that is missing, too many, of another shape, or not finite float32."""
    for name in sorted(state.keys() | expected.keys()):
        if name not in state:
            raise DataError(f"start.model: holds no {name}, which this run shares")
        if name not in expected:
            raise DataError(f"start.model: holds {name}, which this run does not share")
        value, shape = state[name], list(expected[name].shape)
        if list(value.shape) != shape or value.dtype != expected[name].dtype:
            raise DataError(f"start.model: {name} is {value.dtype} {list(value.shape)}, expected float32 {shape}")
        if not bool(value.isfinite().all()):
            raise DataError(f"start.model: {name} holds NaN or inf, expected finite numbers")
