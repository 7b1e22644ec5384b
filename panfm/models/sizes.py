"""Sizes of a model, a step and a state, counted before anything is allocated, whatever the description asks for.

Parameters are counted on torch's meta device, where tensors have shapes and no memory.
"""

import math
from dataclasses import dataclass, field
from functools import lru_cache

from panfm.config import RunConfig, dump_toml
from panfm.errors import ConfigError, LimitError, ProtocolError
from panfm.models.pan import SIZES, describe_model
from panfm.models.patch_features import num_patch_features

_TRAINED_COPIES = 8
"""Numbers per parameter that training holds: student, teacher, gradient, two moments of AdamW, the globals that the
round started from, the parameters that the model was built with, and a copy that a step or a save makes."""
_KEPT_COPIES = 5
"""Numbers per parameter of a private state: teacher, two moments, what the coding lost, and either the student's
parameter or the global one."""
_STATE_HEADER_BYTES = 1 << 20
"""Names and shapes in a private state."""


@dataclass(frozen=True)
class _Description:
    """A run, equal to another by its text."""

    text: str
    run: RunConfig = field(compare=False)


@dataclass(frozen=True)
class _Measures:
    """Numbers that a model has."""

    parameters: int
    per_token: tuple[int, ...]
    """Numbers that a step fills per token, block by block."""


def num_parameters(run: RunConfig) -> int:
    """Count the parameters of the model that `build_model` makes of a run, with all its streams.

    Raises:
        LimitError: the model has more bytes than a 64-bit number can say.
    """
    return _measure(run).parameters


def _measure(run: RunConfig) -> _Measures:
    return _measure_once(_Description(dump_toml(run), run))


@lru_cache(maxsize=8)
def _measure_once(described: _Description) -> _Measures:
    """Describe the model of a run. Sites ask for it in every round, and describing takes as long as several steps."""
    try:
        model = describe_model(described.run)
    except ConfigError as error:
        raise ProtocolError(str(error)) from error
    except (RuntimeError, TypeError) as error:
        if "overflow" not in str(error).lower():
            raise
        raise LimitError.of_question("this run asks for a model of more than 2^63 bytes") from error
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return _Measures(parameters, tuple(model.backbone.numbers_per_token()))


def state_bytes(run: RunConfig) -> int:
    """Bytes of the private state that a site keeps after a round, at most."""
    return 4 * (_KEPT_COPIES * num_parameters(run) + _running_moments(run)) + _STATE_HEADER_BYTES


def tokens_per_patient(run: RunConfig) -> int:
    """Tokens of a patient who has every stream of a run."""
    return sum(math.prod(stream.grid) for stream in run.streams.values())


def step_bytes(run: RunConfig) -> int:
    """Bytes that one local step fills, in float32, at most, for a whole batch of patients who have every stream.

    Counted: all copies of the parameters, what the student's blocks keep of the visible tokens for the backward pass,
    one block of the teacher at work on all tokens and the outputs of the others, targets, guesses, and running moments.
    Not counted: images and their patch features.
    """
    width, depth, _ = SIZES[run.model.size]
    measures = _measure(run)
    per_block = measures.per_token
    features = [num_patch_features(stream, run.model.tokenizer) for stream in run.streams.values()]
    target = 8 * width + run.objective.num_target_values(features)
    tokens = tokens_per_patient(run) + 1
    visible = min((1.0 - run.masking.ratio) * tokens + 1 + len(run.streams), tokens)
    patient = visible * sum(per_block) + tokens * (max(per_block) + depth * width + target)
    batch = math.ceil(run.train.batch_size * run.objective.num_views * patient)
    return 4 * (batch + _TRAINED_COPIES * measures.parameters + _running_moments(run))


def _running_moments(run: RunConfig) -> int:
    """Numbers in the statistics of the objective."""
    width, _, _ = SIZES[run.model.size]
    return run.objective.num_running_values(width, tokens_per_patient(run), len(run.streams))
