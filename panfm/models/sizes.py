"""How large a model would be, counted from its description: nothing is built, whatever the description asks for.

Shape legend: D width, H hidden width of an MLP, R experts, F features of a token.
"""

import math
from collections.abc import Iterable

from panfm.config import RunConfig
from panfm.config.run import DinoConfig, MaeConfig
from panfm.models.pan import SIZES
from panfm.models.stems import stem_features


def num_parameters(run: RunConfig) -> int:
    """Parameters of the model that `build_model` makes of a run, with all its streams."""
    width, depth, _ = SIZES[run.model.size]
    norm, square = 2 * width, _linear(width, width)
    blocks = depth * (2 * norm + 4 * square) + sum(_mlps(run, depth))
    predictor = 2 * norm + 4 * square + _mlp(width, 2 * width)
    heads = predictor + norm + square + _mlp(width, 2 * width)
    if isinstance(run.objective, DinoConfig):
        heads += width * run.objective.prototypes
    return width + blocks + norm + heads + sum(_stream_parameters(run, width))


def tokens_per_patient(run: RunConfig) -> int:
    """Tokens of a patient who has every stream of a run."""
    return sum(math.prod(stream.grid) for stream in run.streams.values())


def step_bytes(run: RunConfig, num_patients: int) -> int:
    """About how many bytes the activations of one local step fill, in float32, for patients who have every stream.

    Counted: what the student's blocks keep of the visible tokens for the backward pass, the teacher's outputs of all
    tokens, and what the objective guesses of the hidden ones. Not counted: parameters, optimiser, images.
    """
    width, depth, _ = SIZES[run.model.size]
    experts, objective = run.model.experts, run.objective
    active = _per_block(experts.active, depth) if run.model.backbone == "director-experts" else [1] * depth
    visible = sum(8 * width + 2 * run.model.hidden_multiple * width * used for used in active)
    guessed = 8 * width
    if isinstance(objective, DinoConfig):
        guessed += 3 * objective.prototypes
    if isinstance(objective, MaeConfig):
        guessed += 2 * max(stem_features(stream, run.model.tokenizer) for stream in run.streams.values())
    tokens = num_patients * tokens_per_patient(run)
    numbers = (1.0 - run.masking.ratio) * visible + run.masking.ratio * guessed + depth * width
    return int(4 * tokens * numbers)


def _stream_parameters(run: RunConfig, width: int) -> Iterable[int]:
    for stream in run.streams.values():
        features = stem_features(stream, run.model.tokenizer)
        decoder = _linear(width, features) if isinstance(run.objective, MaeConfig) else 0
        yield _linear(features, width) + 3 * width + decoder


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
