"""Every number of a run description has a least and a greatest value."""

import typing

import pytest
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from panfm.config import RunConfig, parse_run
from panfm.config.objective import ObjectiveConfig
from panfm.errors import ConfigError
from panfm.privacy.guarantees import checked_run
from panfm.registry import OBJECTIVES
from simulations.cohorts import COHORTS

RUN = """
name = "small"
organs = ["brain"]
[streams]
brain-mr = { spacing-mm = [2.0, 2.0, 2.0], shape = [8, 8, 4], patch = [4, 4, 4] }
"""


def numbers(annotation, metadata, path):
    """(path, constraints) of every number in an annotation, models included."""
    if typing.get_origin(annotation) is typing.Annotated:
        inner, *more = typing.get_args(annotation)
        yield from numbers(inner, [*metadata, *more], path)
    elif annotation in (int, float):
        yield path, metadata
    elif annotation is ObjectiveConfig:
        for name in OBJECTIVES.names:
            yield from numbers(OBJECTIVES.load(name), metadata, path)
    elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
        for name, field in annotation.model_fields.items():
            yield from numbers(field.annotation, field.metadata, f"{path}.{name}")
    elif typing.get_origin(annotation) is not typing.Literal:
        # a union or a container: what is said of a container says nothing of the numbers in it
        is_union = type(None) in typing.get_args(annotation)
        for part in typing.get_args(annotation):
            yield from numbers(part, metadata if is_union else [], path)


def bounds(metadata):
    """Kinds of bound among constraints: "least", "greatest"."""
    found = set()
    for constraint in metadata:
        parts = constraint.metadata if isinstance(constraint, FieldInfo) else [constraint]
        for part in parts:
            found |= {"least"} if hasattr(part, "ge") or hasattr(part, "gt") else set()
            found |= {"greatest"} if hasattr(part, "le") or hasattr(part, "lt") else set()
    return found


def test_every_number_of_a_run_has_a_range():
    described = list(numbers(RunConfig, [], "run"))
    described += [number for kind in COHORTS.names for number in numbers(COHORTS.load(kind), [], f"run.cohort.{kind}")]
    assert len(described) > 70
    assert {
        "run.patient_dp.clip_norm",
        "run.objective.beta",
        "run.objective.prototypes",
        "run.model.experts.noise",
    } <= {path for path, _ in described}
    without = [path for path, metadata in described if bounds(metadata) != {"least", "greatest"}]
    assert without == []


class _Open(BaseModel):
    free: float
    nested: dict[str, tuple[int, ...]]


def test_a_number_without_a_range_is_seen():
    assert [path for path, metadata in numbers(_Open, [], "run") if not bounds(metadata)] == ["run.free", "run.nested"]


PRIVATE = """
[objective]
standardise = false
[masking]
policy = "random"
[patient-dp]
epsilon = 8.0
delta = 1e-3
public-subjects = 100
noise-multiplier = 1.5
sample-rate = 0.1
"""
EDGES = {
    "patient-dp.clip-norm": (1e-3, 1e3),
    "patient-dp.noise-multiplier": (0.3, 1e4),
    "patient-dp.sample-rate": (1e-4, 1.0),
    "patient-dp.delta": (1e-12, 1e-3),
    "patient-dp.epsilon": (0.01, 1e3),
    "patient-dp.statistics-noise": (0.3, 1e4),
    "objective.beta": (1e-3, 1e3),
    "objective.summary-weight": (0.0, 100.0),
    "model.experts.alignment-weight": (0.0, 100.0),
    "model.experts.temperature": (1e-3, 100.0),
    "train.learning-rate": (1e-9, 10.0),
    "train.weight-decay": (0.0, 10.0),
    "masking.strength": (0.0, 100.0),
}


def with_value(key, value):
    """The private run with one key set."""
    table, _, name = key.rpartition(".")
    lines = [line for line in (RUN + PRIVATE).splitlines() if not line.startswith(f"{name} =")]
    if f"[{table}]" in lines:
        lines.insert(lines.index(f"[{table}]") + 1, f"{name} = {value!r}")
    else:
        lines += [f"[{table}]", f"{name} = {value!r}"]
    return "\n".join(lines)


@pytest.mark.parametrize("key", EDGES)
def test_the_edges_of_a_range_are_in_it_and_what_lies_beyond_is_not(key):
    least, greatest = EDGES[key]
    for inside in (least, greatest):
        checked_run(parse_run(with_value(key, inside)))
    for outside in (least - max(abs(least), 1.0) * 1e-3, greatest * 1.001, -1.0, 1e26, 1e-30 if least else -1e-30):
        with pytest.raises(ConfigError, match=key):
            checked_run(parse_run(with_value(key, outside)))
