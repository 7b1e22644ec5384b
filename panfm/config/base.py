"""What every description shares: strict, frozen, kebab-case in TOML, unknown keys refused. And the kinds of values.

Every number of a run has a least and a greatest value (a test keeps it so): who writes a description may be an enemy of
those who run it, and a number far from what was tried leads to arithmetic that nobody looked at.
"""

from collections.abc import Iterator
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

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
"""Less noise, in sensitivities, costs an epsilon that protects nobody, and that the accountant cannot tell well."""
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
BelowOne = Annotated[float, Field(ge=0.0, lt=1.0)]


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
    """A table of a run that declares: nothing in it lets a patient's gradient, or what leaves a site, depend on other
    patients. A table that has no `couplings` is refused in private runs."""

    def couplings(self) -> Iterator[str]:
        """What couples patients, as `key: why, remedy`, one line each: nothing."""
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
