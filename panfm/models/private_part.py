"""A whole model where only its shared part is known: at a site that joins, or read from the folder of a run."""

from collections.abc import Mapping

from torch import Tensor

from panfm.config.sharing import SharingConfig
from panfm.models.pan import PanModel
from panfm.sharing.groups import EXPERTS, is_shared, split_state


def load_with_fresh_private(
    model: PanModel, sharing: SharingConfig, shared: Mapping[str, Tensor], seeded: Mapping[str, Tensor]
) -> None:
    """Load a shared part, and set the private part as if nobody had trained it yet.

    Guarantees:
        experts: each private expert is a copy of its layer's director in `shared`, so that whatever the router says,
            the experts' output is the director's.
        the rest: other private parameters (router, heads) are as in `seeded`.

    Raises:
        RuntimeError: names or shapes do not fit, as from `load_state_dict`.
    """
    _, private = split_state(sharing, model.parameter_groups(), seeded)
    model.load_state_dict(private | dict(shared))
    if not is_shared(sharing, EXPERTS):
        for layer in model.director_experts().values():
            layer.start_experts()
