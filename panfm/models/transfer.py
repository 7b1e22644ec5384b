"""Models made of other models: dense of Director-Experts and back, and without a task.

    director_run, director_state      run and weights of the dense model that the directors of a Director-Experts model
                                      make up
    taskless_run, taskless_state      run and weights of the model without the head of its task
    start_from_dense                  experts and directors as copies of a dense model's MLPs

State-dict names: `<block>.mlp.director.*` of a Director-Experts model stands for `<block>.mlp.*` of a dense one.
"""

from collections.abc import Mapping

from torch import Tensor

from panfm.config import RunConfig
from panfm.config.objective import ObjectiveConfig
from panfm.config.parts import PlainPartsConfig
from panfm.models.director_experts import dense_name
from panfm.models.pan import PanModel
from panfm.sharing.groups import DIRECTOR, EXPERTS, ROUTER

HEADS = "heads."
"""Prefix of the names of a model's heads."""


def director_run(run: RunConfig) -> RunConfig:
    """The same run with a dense backbone, and without settings for groups that a dense model has not."""
    groups = {name: config for name, config in run.sharing.groups.items() if name not in (DIRECTOR, EXPERTS, ROUTER)}
    dense = {
        "model": run.model.model_copy(update={"backbone": "dense"}),
        "sharing": run.sharing.model_copy(update={"groups": groups}),
    }
    return run.model_copy(update=dense)


def director_state(model: PanModel) -> dict[str, Tensor]:
    """State dict of the dense model that goes through the directors alone; loads strictly into `director_run`'s."""
    return {dense_name(name): value for name, value in model.state_dict().items() if name not in _without_dense(model)}


def taskless_run(run: RunConfig) -> RunConfig:
    """The same run without a task: its model has heads of pre-training alone, whatever the pooling."""
    parts = PlainPartsConfig() if run.train.parts.kind == "head" else run.train.parts
    train, objective = run.train.model_copy(update={"parts": parts}), ObjectiveConfig.model_validate({})
    return run.model_copy(update={"task": None, "objective": objective, "train": train})


def taskless_state(state: Mapping[str, Tensor], fresh: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """State dict of the encoder in `state`, with the heads of `fresh`."""
    encoder = {name: value for name, value in state.items() if not name.startswith(HEADS)}
    return encoder | {name: value for name, value in fresh.items() if name.startswith(HEADS)}


def _without_dense(model: PanModel) -> set[str]:
    """Names of the parameters that the dense model does not have."""
    return {name for name, group in model.parameter_groups().items() if group in (EXPERTS, ROUTER)}


def start_from_dense(model: PanModel, state: Mapping[str, Tensor]) -> None:
    """Load a dense model's state; directors and experts become copies of its MLPs, routers stay as they are.

    Raises:
        RuntimeError: names or shapes do not fit, as from `load_state_dict`.
    """
    own, without_dense = model.state_dict(), _without_dense(model)
    kept = {name: own[name] for name in without_dense}
    named = {dense_name(name): name for name in own if name not in without_dense}
    model.load_state_dict(kept | {named.get(name, name): value for name, value in state.items()})
    for layer in model.director_experts().values():
        layer.start_experts()
