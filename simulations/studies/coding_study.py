"""Cost of coding the updates: the quickstart with updates as float32, bf16 and int8.

bf16 and int8 round; what that loses, a site adds to its next update (error feedback, see panfm/sharing/coding.py).
`int8_bytes` is int8's bytes over float32's, all sites together, scales included.
"""

from simulations.harness import (
    QUICKSTART,
    Draws,
    Experiment,
    FirstSeed,
    JsonFile,
    Seeds,
    StudyOptions,
    check_writable,
)
from simulations.studies._federations import compare, show

ARMS = {coding: (f"sharing.coding={coding}",) for coding in ("float32", "bf16", "int8")}


def main(
    seeds: Seeds = 3,
    draws: Draws = 1,
    first_seed: FirstSeed = 0,
    json: JsonFile = None,
    experiment: Experiment = QUICKSTART,
) -> None:
    """Bytes per round and AUC of a federation, by coding of the updates."""
    check_writable(json)
    result = compare("coding", experiment, ARMS, StudyOptions(seeds, draws, first_seed, json=json))
    for arm in ARMS:
        result.ratios[f"{arm}_bytes"] = result.mean("bytes_up_round", arm) / result.mean("bytes_up_round", "float32")
    show(result, ARMS)
    if json:
        result.write(json)
