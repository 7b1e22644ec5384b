"""The shared parameters of a run in two parts: what rounds train and send, and what stays as the run started it.

The second part, the frozen one, travels to a site once. Both are packed by group (`panfm.sharing.groups`).
"""

from collections.abc import Mapping

from torch import Tensor

from panfm.config.sharing import SharingConfig
from panfm.models.pan import PanModel
from panfm.sharing.groups import GroupManifest, parameter_hashes
from panfm.sharing.messages import frozen_name


def trained_manifest(model: PanModel, sharing: SharingConfig) -> GroupManifest:
    """Layout of the groups that a round sends and receives."""
    return GroupManifest.of(model.parameter_groups(), model.travelling_state(sharing))


def frozen_manifest(model: PanModel, sharing: SharingConfig) -> GroupManifest:
    """Layout of the groups' parameters that are not trained; without groups where everything is."""
    return GroupManifest.of(model.parameter_groups(), model.frozen_state(sharing))


def shared_hashes(model: PanModel, sharing: SharingConfig, state: Mapping[str, Tensor]) -> dict[str, str]:
    """SHA-256 of shared parameters: what rounds train by group, what they do not as `<group>/frozen`.

    Args:
        model: Decides names, groups and what is trained; its own values do not matter.
        state: The shared parameters, by name.
    """
    tensors = {name: value.numpy() for name, value in state.items()}
    frozen = parameter_hashes(frozen_manifest(model, sharing).pack_all(tensors))
    trained = parameter_hashes(trained_manifest(model, sharing).pack_all(tensors))
    return trained | {frozen_name(group): digest for group, digest in frozen.items()}
