"""`[gate]`: keep a round only if the model does not get worse by it."""

from collections.abc import Iterator
from typing import Literal

from panfm.config.base import Config


class GateConfig(Config):
    """Keep a round only if a measure of the global model, summed over the sites, does not get worse; else the next
    round starts where this one did. The start is measured too, so the released model is never worse by the measure.
    Leave the table out to keep every round."""

    measure: Literal["labels", "validation-loss"] = "labels"
    """labels: error of a ridge regression of the labels of `probe.tasks`, fitted on sums over the sites' training
    patients, by generalised cross-validation (Golub, Heath and Wahba 1979): leave-one-out with equal leverages, mean
    over the tasks, 1 without any use. validation-loss: loss of the objective on the sites' val splits, which heads and
    teachers of a site share in: it falls as heads learn, so where there are labels it is the weaker choice."""

    def couplings(self) -> Iterator[str]:
        """Yield what lets numbers of patients out of a private run without noise."""
        yield "measure: is summed over patients without noise, leave the table out"
