"""What a strategy carries from round to round; it lies in the server's checkpoint, so that resuming is exact."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from panfm.sharing.groups import Flat

Norms = Mapping[str, tuple[float, ...]]
"""Group -> median norm of the accepted updates of each of the last rounds, oldest first."""


@dataclass(frozen=True)
class Memory:
    """Everything but the model itself."""

    norms: Norms = field(default_factory=dict)
    slots: Mapping[str, Mapping[str, Flat]] = field(default_factory=dict)
    """Group -> slot of its server optimiser -> float32 array, e.g. `momentum`."""
