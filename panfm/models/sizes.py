"""How large a model would be, counted from its description: nothing is built, whatever the description asks for.

Shape legend: D width, H hidden width of an MLP, R experts, F features of a token.
"""

import math
from collections.abc import Iterable

from panfm.config import RunConfig
from panfm.models.pan import SIZES
from panfm.models.stems import stem_features

_TRAINED_COPIES = 8
"""Numbers per parameter that training holds: student, teacher, gradient, two moments of AdamW, the globals that the
round started from, the parameters that the model was built with, and a copy that a step or a save makes."""
_KEPT_COPIES = 5
"""Numbers per parameter of a private state: teacher, two moments, what the coding lost, and either the student's
parameter or the global one."""
_STATE_HEADER_BYTES = 1 << 20
"""Names and shapes in a private state."""


def num_parameters(run: RunConfig) -> int:
    """Parameters of the model that `build_model` makes of a run, with all its streams."""
    width, depth, _ = SIZES[run.model.size]
    norm, square = 2 * width, _linear(width, width)
    blocks = depth * (2 * norm + 4 * square) + sum(_mlps(run, depth))
    predictor = 2 * norm + 4 * square + _mlp(width, 2 * width)
    heads = predictor + norm + square + _mlp(width, 2 * width) + run.objective.num_head_parameters(width)
    return width + blocks + norm + heads + sum(_stream_parameters(run, width))


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
    Not counted: images and their stem maps.
    """
    width, depth, _ = SIZES[run.model.size]
    per_block = [_block_numbers(run, used) for used in _active(run, depth)]
    features = [stem_features(stream, run.model.tokenizer) for stream in run.streams.values()]
    target = 8 * width + run.objective.num_target_values(features)
    tokens = tokens_per_patient(run) + 1
    visible = min((1.0 - run.masking.ratio) * tokens + 1 + len(run.streams), tokens)
    patient = visible * sum(per_block) + tokens * (max(per_block) + depth * width + target)
    batch = math.ceil(run.train.batch_size * patient)
    return 4 * (batch + _TRAINED_COPIES * num_parameters(run) + _running_moments(run))


def _block_numbers(run: RunConfig, used: int) -> int:
    """What one block fills per token: attention, the MLPs used before and after their activation, their inputs and
    outputs, and the director beside them."""
    width, _, _ = SIZES[run.model.size]
    hidden = run.model.hidden_multiple * width
    return 10 * width + (used + (run.model.backbone == "director-experts")) * (2 * hidden + 2 * width)


def _active(run: RunConfig, depth: int) -> list[int]:
    """MLPs that a token goes through, block by block."""
    return [1] * depth if run.model.backbone == "dense" else _per_block(run.model.experts.active, depth)


def _running_moments(run: RunConfig) -> int:
    """Numbers in the statistics of the objective."""
    width, _, _ = SIZES[run.model.size]
    return run.objective.num_running_values(width, tokens_per_patient(run), len(run.streams))


def _stream_parameters(run: RunConfig, width: int) -> Iterable[int]:
    for stream in run.streams.values():
        features = stem_features(stream, run.model.tokenizer)
        yield _linear(features, width) + 3 * width + run.objective.num_stream_head_parameters(width, features)


def _mlps(run: RunConfig, depth: int) -> list[int]:
    """Parameters of each block's MLP, or of its experts, director and router."""
    width, _, _ = SIZES[run.model.size]
    one = _mlp(width, run.model.hidden_multiple * width)
    if run.model.backbone == "dense":
        return [one] * depth
    return [(1 + count) * one + count * width for count in _per_block(run.model.experts.count, depth)]


def _per_block(numbers: tuple[int, ...], depth: int) -> list[int]:
    return list(numbers) * depth if len(numbers) == 1 else list(numbers)


def _mlp(width: int, hidden: int) -> int:
    return _linear(width, hidden) + _linear(hidden, width)


def _linear(inputs: int, outputs: int) -> int:
    return (inputs + 1) * outputs
