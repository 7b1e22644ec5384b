"""Comparison of server optimisers: the run `transient`, with as many rounds and local steps in every arm.

    mean      go where the weighted mean points (the default)
    nesterov  DiLoCo's outer step
    adam      FedAdam
    fedprox   mean; sites are pulled back to the round's global parameters
    l-dawa    mean; each layer weighted by how little it turned from the global one

nesterov's rates are the better of two tried on development draw 100, adam's rate is the best of three (LOG.md).
"""

from simulations.harness import TRANSIENT, Experiment, StudyOptions, study
from simulations.studies._federations import compare, show
from simulations.study_result import StudyResult

ARMS = {
    "mean": (),
    "nesterov": ("sharing.optimiser={kind='momentum', learning-rate=0.7, momentum=0.5}",),
    "adam": ("sharing.optimiser={kind='adam', learning-rate=0.001}",),
    "fedprox": ("train.proximal-mu=1.0",),
    "l-dawa": ("sharing.mean=l-dawa",),
}


@study(seeds=3)
def main(options: StudyOptions, experiment: Experiment = TRANSIENT) -> StudyResult:
    """AUC of a federation at equal budget, by server optimiser."""
    result = compare("server-optimisers", experiment, ARMS, options)
    show(result, ARMS)
    return result
