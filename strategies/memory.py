"""What a strategy carries from round to round; it lies in the server's checkpoint, so that resuming is exact."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from numpy.typing import NDArray

from panfm.sharing.groups import Flat

Norms = Mapping[str, Mapping[str, tuple[tuple[int, float], ...]]]
"""Group -> site -> (round, norm of its accepted update) of the last rounds, oldest first."""


@dataclass
class Memory:
    """Everything but the model itself."""

    norms: Norms = field(default_factory=dict)
    slots: dict[str, Mapping[str, Flat]] = field(default_factory=dict)
    """Group -> slot of its server optimiser -> float32 array, e.g. `momentum`."""
    step: dict[str, NDArray[Any]] = field(default_factory=dict)
    """The last step of the global parameters as it travels; nothing where updates travel as float32."""
    lost: dict[str, Flat] = field(default_factory=dict)
    """Group -> what the coding of its last step lost."""
    holders: tuple[str, ...] = ()
    """Sites that hold the parameters that the last step starts from."""
    average: dict[str, Flat] = field(default_factory=dict)
    """Group -> EMA of its global parameters; nothing unless teachers start there."""
    votes: dict[str, NDArray[Any]] = field(default_factory=dict)
    """Group -> what the accepted updates of the round in which it was last trained agreed on (direction.py)."""
    cosines: dict[str, dict[str, float]] = field(default_factory=dict)
    """Group -> site -> cosine of its accepted update, in that round, with the votes before."""
    voters: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Group -> the sites whose updates these votes are of."""
