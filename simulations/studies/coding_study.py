"""Cost of coding the updates: the run `transient` with updates as float32, bf16 and int8.

bf16 and int8 round; what that loses, a site adds to its next update (error feedback, see panfm/sharing/coding.py).
`int8_bytes` is int8's bytes over float32's, all sites together, scales included.
"""

from simulations.harness import TRANSIENT, Experiment, StudyOptions, study
from simulations.studies._federations import compare, show
from simulations.study_result import StudyResult

ARMS = {coding: (f"sharing.coding={coding}",) for coding in ("float32", "bf16", "int8")}


@study(seeds=3)
def main(options: StudyOptions, experiment: Experiment = TRANSIENT) -> StudyResult:
    """Bytes per round and AUC of a federation, by coding of the updates."""
    result = compare("coding", experiment, ARMS, options)
    for arm in ARMS:
        result.ratios[f"{arm}_bytes"] = result.mean("bytes_up_round", arm) / result.mean("bytes_up_round", "float32")
    show(result, ARMS)
    return result
