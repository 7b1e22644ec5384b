"""Gate of an adaptation: of the start and the model after every round, the one with the least validation error stays.

Rounds go on from the round before, whether it is kept or not, so that a run is trained once and judged afterwards. Of
equal errors the earlier model stays, the start first. Checkpoints of the last three rounds are there to be judged.
"""

from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass

import torch

from panfm.files import RoundFiles
from panfm.models import PanModel
from panfm.models.packing import trained_manifest
from panfm.models.warm_start import start_model
from server.checkpoint import load_round
from server.run_folder import RunFolder
from simulations.studies._federations import outcome


@dataclass(frozen=True)
class KeptRound:
    """The round that a gate keeps."""

    number: int
    """0: the start."""
    error: float
    model: PanModel


def kept_round(folder: RunFolder, error: Callable[[PanModel], float]) -> KeptRound:
    """Judge the start and the rounds of a run that has ended by a validation error.

    Args:
        error: The lower, the better; not of test data.
    """
    judged = (KeptRound(number, error(model), model) for number, model in round_models(folder))
    return min(judged, key=lambda kept: kept.error)


def round_models(folder: RunFolder) -> Iterator[tuple[int, PanModel]]:
    """The start, as round 0, and the model after every round whose checkpoint is kept."""
    last, checkpoints = outcome(folder).model, folder.path / "checkpoint"
    manifest = trained_manifest(last, folder.run.sharing)
    yield 0, start_model(folder.run)
    for number in filter(None, RoundFiles(checkpoints).rounds()):
        trained = manifest.unpack_all(load_round(checkpoints, number).groups)
        model = deepcopy(last)
        model.load_state_dict(last.state_dict() | {name: torch.from_numpy(value) for name, value in trained.items()})
        yield number, model
