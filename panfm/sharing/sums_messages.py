"""The server's question for sums over a site's patients, or for an evaluation on them, and the answer (messages.py).

down   as the task of a round, whose number is that of the round which would start from the parameters; and
       config   purpose; column    of the label table, to evaluate on
       arrays   path/<task>/<part>     float64, a ridge path (panfm/evaluate/label_sums.py), to ask for errors
up     arrays   sums/<task>/<part>     float64, sums of features and labels
                errors/<task>          float64, summed squared leave-one-out errors
                inputs/<stream>/<part> float64, sums of the tokenizer's inputs (panfm/evaluate/input_sums.py)
                score/<metric>         float64 [4], AUC or R2, its interval, and 1 if of held-out patients, else 0
       metrics  loss, loss-subjects    summed validation loss, and of how many subjects
                scored                 patients behind a score
       config   run-id, round
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Self

from numpy.typing import NDArray

from panfm.errors import ProtocolError
from panfm.sharing.coding import Arrays
from panfm.sharing.messages import Metric, Records, RoundTask, config_value

Parts = Mapping[str, NDArray[Any]]
"""Part -> array."""
_PATH, _SUMS, _ERRORS, _INPUTS, _SCORE = "path", "sums", "errors", "inputs", "score"


class Purpose(StrEnum):
    """What sums are asked for."""

    GATE = "gate"
    """The measure by which a round is kept."""
    PROBE = "probe"
    """Sums of features and labels for the probe of all sites."""
    ERRORS = "errors"
    """Leave-one-out errors of this probe, by which its penalty is chosen."""
    INPUTS = "inputs"
    """Sums of what the tokenizers read, from which `input-centre` and `input-scale` are computed before round 1."""
    EVALUATION = "evaluation"
    """AUC or R2 of the model on a column of labels."""


@dataclass(frozen=True)
class SumsTask:
    """The server's question to a site."""

    model: RoundTask
    """Run, parameters, and the round that would start from them; 1: the start of the run."""
    purpose: Purpose
    paths: Mapping[str, Parts] = field(default_factory=dict)
    """Task of labels -> its ridge path, to ask for errors."""
    column: str = ""
    """Column of the label table, to ask for an evaluation."""

    def to_records(self) -> Records:
        """Convert to records."""
        records = self.model.to_records()
        arrays, column = {**records.arrays, **path_arrays(self.paths)}, {"column": self.column} if self.column else {}
        return Records(arrays, {}, {**records.config, "purpose": str(self.purpose), **column})

    @classmethod
    def from_records(cls, records: Records) -> Self:
        """Read it back. Raises ProtocolError if something is missing or of the wrong type."""
        purpose = config_value(records.config, "purpose", str)
        if purpose not in list(Purpose):
            raise ProtocolError(f"message: purpose is {purpose!r:.40}, expected one of {', '.join(Purpose)}")
        parameters = {name: array for name, array in records.arrays.items() if not name.startswith(f"{_PATH}/")}
        model = RoundTask.from_records(Records(parameters, {}, records.config))
        column = config_value(records.config, "column", str) if purpose == Purpose.EVALUATION else ""
        return cls(model, Purpose(purpose), _nested(records.arrays, _PATH), column)


@dataclass(frozen=True)
class SumsReply:
    """A site's answer. Only `panfm.sharing.release.build_sums_reply` makes one."""

    run_id: str
    round_number: int
    sums: Mapping[str, Parts] = field(default_factory=dict)
    """Task of labels -> sums over the patients who know them."""
    errors: Arrays = field(default_factory=dict)
    """Task of labels -> summed squared errors per penalty and label."""
    loss: float | None = None
    """Summed over the subjects of the val split."""
    loss_subjects: int | None = None
    inputs: Mapping[str, Parts] = field(default_factory=dict)
    """Stream -> sums of what its tokenizer reads."""
    score: Arrays = field(default_factory=dict)
    """Metric -> AUC or R2, its interval, and whether its patients are held out."""
    scored: int | None = None
    """Patients behind the score."""

    def to_records(self) -> Records:
        """Convert to records."""
        arrays = _flat(_SUMS, self.sums) | _flat(_INPUTS, self.inputs)
        arrays |= {f"{_ERRORS}/{task}": array.ravel() for task, array in self.errors.items()}
        arrays |= {f"{_SCORE}/{metric}": array for metric, array in self.score.items()}
        numbers: dict[str, Metric | None] = {"loss": self.loss, "loss-subjects": self.loss_subjects}
        numbers["scored"] = self.scored
        metrics = {key: value for key, value in numbers.items() if value is not None}
        return Records(arrays, metrics, {"run-id": self.run_id, "round": self.round_number})

    @classmethod
    def from_records(cls, records: Records) -> Self:
        """Read it back. Raises ProtocolError if something is missing or of the wrong type."""
        errors, score = (
            {
                name.removeprefix(f"{kind}/"): array
                for name, array in records.arrays.items()
                if name.startswith(f"{kind}/")
            }
            for kind in (_ERRORS, _SCORE)
        )
        loss, subjects, scored = (records.metrics.get(key) for key in ("loss", "loss-subjects", "scored"))
        return cls(
            config_value(records.config, "run-id", str),
            config_value(records.config, "round", int),
            _nested(records.arrays, _SUMS),
            errors,
            float(loss) if isinstance(loss, int | float) else None,
            subjects if isinstance(subjects, int) else None,
            _nested(records.arrays, _INPUTS),
            score,
            scored if isinstance(scored, int) else None,
        )


def path_arrays(paths: Mapping[str, Parts]) -> dict[str, NDArray[Any]]:
    """The arrays of a question that hold ridge paths, by their names in it."""
    return _flat(_PATH, paths)


def _flat(kind: str, tasks: Mapping[str, Parts]) -> dict[str, NDArray[Any]]:
    return {f"{kind}/{task}/{name}": part.ravel() for task, parts in tasks.items() for name, part in parts.items()}


def _nested(arrays: Arrays, kind: str) -> dict[str, dict[str, NDArray[Any]]]:
    """Arrays `<kind>/<task>/<part>` by task, or stream, and part."""
    tasks: dict[str, dict[str, NDArray[Any]]] = {}
    for name, array in arrays.items():
        if name.startswith(f"{kind}/"):
            _, task, part = [*name.split("/", 2), ""][:3]
            tasks.setdefault(task, {})[part] = array
    return tasks
