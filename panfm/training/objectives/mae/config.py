"""`[objective]` named `mae`."""

from collections.abc import Iterator, Sequence
from typing import ClassVar, Literal

from panfm.config.objective import ObjectiveConfig


class MaeConfig(ObjectiveConfig):
    """Reconstruct the normalised voxels of hidden patches."""

    implementation: ClassVar[str | type] = "panfm.training.objectives.mae.objective:MaeObjective"
    name: Literal["mae"] = "mae"

    def couplings(self) -> Iterator[str]:
        """Yield nothing: no key of the table couples patients."""
        return iter(())

    def num_target_values(self, num_features: Sequence[int]) -> int:
        """Count the numbers of a patch and its reconstruction."""
        return 2 * max(num_features)
