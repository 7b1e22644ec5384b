"""`[objective]`: the self-supervised loss.

Every objective has a config class of its own, beside its loss in `panfm/training/objectives`; `name` chooses it. Such a
class also declares, as `couplings`, what in it couples patients; without this declaration private runs refuse it.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, Self

from pydantic import ModelWrapValidatorHandler, model_validator

from panfm.config.base import Config, check_plug_in
from panfm.registry import OBJECTIVES


class ObjectiveConfig(Config):
    """Base of the options of all objectives. A table without a name is one of `latent`."""

    implementation: ClassVar[str | type]
    """The objective's class, or `package.module:Class`."""
    name: str

    @classmethod
    def chosen(cls, table: Any) -> type["ObjectiveConfig"]:
        """Config class that the name in a table chooses."""
        name = table.get("name", "latent") if isinstance(table, Mapping) else None
        if cls is not ObjectiveConfig or name is None:
            return cls
        config_class: type[ObjectiveConfig] = OBJECTIVES.load(check_plug_in(OBJECTIVES, name))
        return config_class

    @model_validator(mode="wrap")
    @classmethod
    def _read_by_chosen_class(cls, table: Any, handler: ModelWrapValidatorHandler[Self]) -> Any:
        chosen = cls.chosen(table)
        return handler(table) if chosen is cls else chosen.model_validate(table, by_alias=True, by_name=False)

    @property
    def num_views(self) -> int:
        """Views of each patient in a step, drawn by `[augment]`; objectives that compare views ask for two."""
        return 1

    @property
    def hides_tokens(self) -> bool:
        """Whether the student sees only the tokens that `[masking]` leaves visible."""
        return True

    @property
    def streams_per_batch(self) -> Literal["all", "one", "one-or-pair"]:
        """Streams that a batch shows: all that its patients hold; one that they all hold; or also two, one per view."""
        return "all"

    def without_running_statistics(self) -> Self:
        """The same objective without statistics over the patients of a batch, where it can do without them."""
        return self

    def num_target_values(self, num_features: Sequence[int]) -> int:
        """Numbers that a step fills per token beyond features of the model's width, given the features per stream."""
        return 0

    def num_running_values(self, width: int, num_tokens: int, num_streams: int) -> int:
        """Count the numbers in the statistics that the objective keeps from step to step."""
        return 0
