"""`[task]`: labels on which a run trains a head, and the parts of the encoder that `train.parts` names.

Every site reads the same classes, or centres and scales a number alike, because the description says so: nothing about
the labels is counted before the first round.
"""

from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from panfm.cells import plain_cell
from panfm.config.base import Uncoupled
from panfm.config.probe import LabelName

LabelKind = Literal["yes-no", "classes", "number"]
_Unit = Annotated[float, Field(ge=-1e12, le=1e12)]


class TaskConfig(Uncoupled):
    """A column of the sites' label tables, which a run learns to predict. Patients without this label do not train.

    A site takes part only if its `limits.training-labels` names the column."""

    label: LabelName
    """Column of `labels.csv`."""
    kind: LabelKind
    """yes-no: one logit, binary cross-entropy; classes: a logit each, cross-entropy; number: squared error."""
    classes: Annotated[tuple[Annotated[str, Field(min_length=1, max_length=128)], ...], Field(strict=False)] = ()
    """Cells of the column. yes-no: the no, then the yes, 0 and 1 when left out; classes: all of them, 2 to 64."""
    centre: _Unit | None = None
    """Centre of a number: about its mean over the patients of all sites, known beforehand."""
    scale: Annotated[float, Field(ge=1e-12, le=1e12)] | None = None
    """Scale of a number: about its standard deviation."""

    personal_steps: Annotated[int, Field(ge=0, le=1_000_000)] = 0
    """Steps that a copy of the final model takes on each site's own labels, for comparison, at the end of a simulation;
    none when left out. At a hospital `panfm finetune` does it."""

    @field_validator("classes")
    @classmethod
    def _classes_stand_once(cls, classes: tuple[str, ...]) -> tuple[str, ...]:
        plain = [plain_cell(name) for name in classes]
        if twice := [name for number, name in enumerate(classes) if plain[number] in plain[:number]]:
            raise ValueError(f"{twice[0]!r} stands twice, expected once (case does not tell classes apart)")
        return classes

    @model_validator(mode="after")
    def _kind_has_its_keys(self) -> Self:
        is_number, num = self.kind == "number", len(self.classes)
        least, most = {"yes-no": (2, 2), "classes": (2, 64), "number": (0, 0)}[self.kind]
        if not (least <= num <= most or (self.kind == "yes-no" and num == 0)):
            expected = {"yes-no": "two, the no and the yes", "classes": "2 to 64", "number": "none of a number"}
            raise ValueError(f"classes: found {num}, expected {expected[self.kind]}")
        for key, value in (("centre", self.centre), ("scale", self.scale)):
            if is_number and value is None:
                raise ValueError(f"{key}: missing, a number needs centre and scale, the same at all sites")
            if not is_number and value is not None:
                raise ValueError(f'{key}: only for kind = "number" (got "{self.kind}")')
        return self

    @property
    def cells(self) -> tuple[str, ...]:
        """Cells of the classes: of yes-no the no, then the yes; none of a number."""
        return self.classes or (("0", "1") if self.kind == "yes-no" else ())

    @property
    def outputs(self) -> tuple[str, ...]:
        """One name per output: the label, or `<label>=<class>`."""
        return tuple(f"{self.label}={name}" for name in self.classes) if self.kind == "classes" else (self.label,)
