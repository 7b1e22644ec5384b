"""Warm start: what a run shares, taken from a model that was trained before.

The file of weights is the description's by its hash; streams, model and every parameter must be the run's own, since a
model that fits by chance (another voxel size, another order of channels) would train on without a word.

A Director-Experts run may also start from a dense model of the same size: directors and experts are then copies of its
MLPs, routers as the run's seed has them.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from panfm.config import RunConfig, load_run
from panfm.errors import DataError
from panfm.models.export import director_run, director_state, start_from_dense
from panfm.models.pan import build_model
from panfm.sharing.groups import GroupManifest, parameter_hashes, split_state


def read_start(run: RunConfig) -> bytes:
    """The weights file that `run.start.model` names, checked.

    Raises:
        ConfigError: the folder's `run.toml` is absent or does not hold.
        DataError: the weights are absent, or do not fit the run.
    """
    assert run.start is not None
    if run.start.model is None:
        raise DataError("start.model: missing, expected the folder of the model that start.sha256 tells of")
    folder = Path(run.start.model)
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


def with_start_parameters(run: RunConfig, content: bytes) -> RunConfig:
    """The run with the hashes of what it starts from, group by group, by which sites know them.

    Raises:
        DataError: as `start_state` does.
    """
    assert run.start is not None
    hashes = _hashes(start_state(run, content))
    return run.model_copy(update={"start": run.start.model_copy(update={"parameters": hashes})})


def start_state(run: RunConfig, content: bytes) -> dict[str, Tensor]:
    """The shared parameters in a weights file, by name.

    Raises:
        DataError: it is not the file that the run's description tells of, or not what the run shares.
    """
    assert run.start is not None
    state = _read_state(run, content)
    expected, hashes = run.start.parameters, _hashes(state)
    if expected is not None and expected != hashes:
        groups = [group for group in sorted(hashes | expected) if hashes.get(group) != expected.get(group)]
        raise DataError(f"start.parameters: the weights have another {groups[0]}, expected the one of this hash")
    return state


def _hashes(state: Mapping[str, Tensor]) -> dict[str, str]:
    tensors = {name: value.numpy() for name, value in state.items()}
    return parameter_hashes(GroupManifest.of({name: value.shape for name, value in tensors.items()}).pack_all(tensors))


def _read_state(run: RunConfig, content: bytes) -> dict[str, Tensor]:
    assert run.start is not None
    found = hashlib.sha256(content).hexdigest()
    if found != run.start.sha256:
        raise DataError(f"start.sha256: the weights have {found}, expected {run.start.sha256}")
    try:
        state = safetensors.torch.load(content)
    except (ValueError, SafetensorError) as error:
        raise DataError("start.model: expected weights as a run exports them") from error
    if run.model.backbone == "director-experts" and not any(".mlp.director." in name for name in state):
        dense = director_run(run)
        _check_fit(state, split_state(dense.sharing, build_model(dense).state_dict())[0])
        return _with_experts(run, state)
    _check_fit(state, split_state(run.sharing, build_model(run).state_dict())[0])
    return state


def _is_its_dense_model(before: RunConfig, run: RunConfig) -> bool:
    """Whether the directors of a run's model alone make up such a model."""
    dense = before.model.model_copy(update={"experts": run.model.experts})
    return run.model.backbone == "director-experts" and dense == director_run(run).model


def _with_experts(run: RunConfig, dense: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a run shares, started from what a dense one shared."""
    model = build_model(run)
    start_from_dense(model, director_state(model.state_dict()) | dict(dense))
    return split_state(run.sharing, model.state_dict())[0]


def _check_fit(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Raises DataError at the first parameter that is missing, too many, of another shape, or not finite float32."""
    for name in sorted(found.keys() | expected.keys()):
        if name not in found:
            raise DataError(f"start.model: holds no {name}, which this run shares")
        if name not in expected:
            raise DataError(f"start.model: holds {name}, which this run does not share")
        value, shape = found[name], list(expected[name].shape)
        if list(value.shape) != shape or value.dtype != expected[name].dtype:
            raise DataError(f"start.model: {name} is {value.dtype} {list(value.shape)}, expected float32 {shape}")
        if not bool(value.isfinite().all()):
            raise DataError(f"start.model: {name} holds NaN or inf, expected finite numbers")
