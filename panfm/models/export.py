"""Between Director-Experts and a dense ViT: the directors alone are one, and a dense one can start experts.

    director_run, director_state      the run and the weights of the plain dense model that the directors make up
    start_from_dense                  experts and directors as copies of a dense model's MLPs

State-dict names: `blocks.<i>.mlp.director.*` of the one stands for `blocks.<i>.mlp.*` of the other.
"""

from collections.abc import Mapping

from torch import Tensor

from panfm.config import RunConfig
from panfm.models.director_experts import dense_name
from panfm.models.pan import PanModel
from panfm.sharing.groups import DIRECTOR, EXPERTS, ROUTER

_ONLY_WITH_EXPERTS = (".mlp.experts.", ".mlp.router.")


def director_run(run: RunConfig) -> RunConfig:
    """The same run with a dense backbone, and without what its sharing says of groups that a dense model has not."""
    groups = {name: config for name, config in run.sharing.groups.items() if name not in (DIRECTOR, EXPERTS, ROUTER)}
    dense = {
        "model": run.model.model_copy(update={"backbone": "dense"}),
        "sharing": run.sharing.model_copy(update={"groups": groups}),
    }
    return run.model_copy(update=dense)


def director_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """State dict of the dense model that goes through the directors alone; loads strictly into `director_run`'s."""
    return {
        dense_name(name): value for name, value in state.items() if not any(part in name for part in _ONLY_WITH_EXPERTS)
    }


def start_from_dense(model: PanModel, state: Mapping[str, Tensor]) -> None:
    """Load a dense model's state; directors and experts become copies of its MLPs, routers stay as they are.

    Raises:
        RuntimeError: names or shapes do not fit, as from `load_state_dict`.
    """
    own = model.state_dict()
    kept = {name: value for name, value in own.items() if any(part in name for part in _ONLY_WITH_EXPERTS)}
    named = {dense_name(name): name for name in own if name not in kept}
    model.load_state_dict(kept | {named.get(name, name): value for name, value in state.items()})
    for layer in model.director_experts().values():
        layer.start_experts()
