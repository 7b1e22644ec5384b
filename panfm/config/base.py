"""The base class of all tables of a description, strict and frozen, kebab-case in TOML; and types of values.

Every number of a run has a least and a greatest value (a test keeps it so): who writes a description may be an enemy of
those who run it, and a number far from what was tried leads to arithmetic that nobody looked at.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from panfm.errors import ConfigError
from panfm.registry import Registry

Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")]
Positive = Annotated[int, Field(gt=0, le=1_000_000_000)]
"""A number of things, for which no smaller limit is known."""
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]
Weight = Annotated[float, Field(ge=0.0, le=100.0)]
"""Of a term in a loss; 1 is as much as the others."""
ClipNorm = Annotated[float, Field(ge=1e-3, le=1e3)]
Timeout = Annotated[float, Field(gt=0.0, le=2_592_000.0)]
"""Seconds, up to thirty days."""
Temperature = Annotated[float, Field(ge=1e-3, le=100.0)]
LEAST_NOISE = 0.3
"""Noise, in sensitivities, below which no round may claim a guarantee: one release of all patients then costs an
epsilon of about 20, and small errors in the noise's scale decide what is booked."""
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
BelowOne = Annotated[float, Field(ge=0.0, lt=1.0)]


def _plain_values(table: dict[str, Any]) -> dict[str, Any]:
    """Return a table of text, finite numbers, true and false, lists and tables. Raises ValueError for another value."""
    values: list[tuple[str, Any]] = list(table.items())
    for key, value in values:
        if isinstance(value, dict | list):
            below = value.items() if isinstance(value, dict) else enumerate(value)
            values += [(f"{key}.{name}", inner) for name, inner in below]
        elif not isinstance(value, str | int | float) or (isinstance(value, float) and not math.isfinite(value)):
            raise ValueError(f"{key}: found {value!r:.80}, expected text, a finite number, true, false, list or table")
    return table


TomlTable = Annotated[dict[str, Any], AfterValidator(_plain_values)]
"""A table that another package checks."""


class Config(BaseModel):
    """Frozen and strict; the TOML key of field `local_steps` is `local-steps`."""

    model_config = ConfigDict(
        alias_generator=lambda name: name.replace("_", "-"),
        extra="forbid",
        frozen=True,
        strict=True,
        validate_default=True,
        use_attribute_docstrings=True,
        validate_by_alias=True,
        validate_by_name=True,
        allow_inf_nan=False,
    )


class Uncoupled(Config):
    """Base of tables in which no key couples patients: a patient's gradient, and what leaves a site, depend on no
    other patient by it. A table without `couplings` is refused in private runs."""

    habits: ClassVar[Mapping[str, str]] = {}
    """Keys that other frameworks have -> why there is none here, and what to do."""

    @model_validator(mode="before")
    @classmethod
    def _habits_of_other_frameworks(cls, table: Any) -> Any:
        for key in table if isinstance(table, dict) else ():
            if key in cls.habits:
                raise ValueError(f"{key}: {cls.habits[key]}")
        return table

    def couplings(self) -> Iterator[str]:
        """Yield nothing: no key of the table couples patients."""
        return iter(())


class UnknownNameError(ValueError):
    """A name that chooses no plug-in; the text begins with the dotted key."""


def check_plug_in(registry: Registry, name: str) -> str:
    """Return a name that a registry knows; any other is a fault of the description."""
    try:
        return registry.check(name)
    except ConfigError as error:
        raise UnknownNameError(str(error)) from None


def plug_in(registry: Registry) -> AfterValidator:
    """Validator of a field that chooses a plug-in by name."""
    return AfterValidator(lambda name: check_plug_in(registry, name))
