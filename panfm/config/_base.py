"""What every description shares: strict, frozen, kebab-case in TOML, unknown keys refused."""

from pydantic import BaseModel, ConfigDict


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
