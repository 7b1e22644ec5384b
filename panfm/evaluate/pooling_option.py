"""Reads the option `--pooling` of commands, and of the notebook."""

from typing import get_args

from pydantic import ValidationError

from panfm.config.features import FeaturesConfig, Pooling
from panfm.errors import ConfigError


def parse_pooling(text: str) -> FeaturesConfig:
    """Read `--pooling`: the name of a pooling, with `:` and block numbers where it reads blocks; without whitening.

    Raises:
        ConfigError: the text is none of these.
    """
    name, colon, numbers = text.partition(":")
    try:
        if colon:
            return FeaturesConfig.model_validate(
                {"pooling": name, "layers": [int(part) for part in numbers.split(",")]}
            )
        return FeaturesConfig.model_validate({"pooling": name})
    except (ValidationError, ValueError):
        expected = f"one of {', '.join(get_args(Pooling))}; of layers perhaps some, ascending: layers:8,10,12"
        raise ConfigError(f"--pooling: found {text!r:.80}, expected {expected}") from None
