"""Computes for the report of a Director-Experts run how much each expert contributes to each stream's images.

Images are shown stream by stream. Private experts are those of each site, on its own training subjects; pooled ones are
the shared model's, on held-out subjects.
"""

from copy import deepcopy

import numpy as np
import torch
from numpy.typing import NDArray

from panfm.config import RunConfig
from panfm.data.store import ImageStore
from panfm.models import PanModel
from panfm.report.report_data import ExpertMap, ExpertRow
from panfm.sharing.groups import EXPERTS, is_shared
from panfm.site.state import StateStore
from server.run_folder import RunFolder
from simulations.cohorts.opened import OpenedCohort

_MOST_SUBJECTS = 64


def expert_map(run: RunConfig, run_dir: RunFolder, shared: PanModel, opened: OpenedCohort) -> ExpertMap | None:
    """Measure the routing of the last layer with experts; None for a dense model, or if the run folder lacks the sites'
    private experts."""
    layers = list(shared.director_experts())
    if not layers:
        return None
    rows: list[ExpertRow] = []
    if is_shared(run.sharing, EXPERTS):
        rows += _rows("", shared, opened.holdout.store, "test")
    else:
        for folder, place in opened.sites.items():
            if (run_dir.path / "sites" / folder).is_dir():
                rows += _rows(place.name, model_at_site(run_dir, shared, folder), place.store, "train")
    return ExpertMap(layers[-1], rows) if rows else None


def model_at_site(folder: RunFolder, shared: PanModel, site: str) -> PanModel:
    """Return the shared model with one site's private parameters, read from the run folder of a simulation."""
    state = folder.latest_state()
    assert state is not None
    kept = StateStore(folder.path / "sites" / site, state.run_id).load(state.round_number)
    private = {name.removeprefix("student."): value for name, value in kept.items() if name.startswith("student.")}
    model = deepcopy(shared)
    model.load_state_dict(shared.state_dict() | private)
    return model


def _rows(site: str, model: PanModel, store: ImageStore, split: str) -> list[ExpertRow]:
    streams = [stream for stream in model.stream_names if stream in store.images]
    holders = {stream: store.holders(store.indices(split), [stream])[:_MOST_SUBJECTS] for stream in streams}
    return [ExpertRow(site, stream, _shares(model, store, stream, at)) for stream, at in holders.items() if len(at)]


@torch.inference_mode()
def _shares(model: PanModel, store: ImageStore, stream: str, at: NDArray[np.int64]) -> list[float]:
    """Share of each expert of the last layer in the router's gates for one stream's images."""
    batch = store.batch(at, [stream]).to(model.stream_of_patch.device)
    mass = model.eval().encode(model.patch_features(batch)).routed[-1].mass()
    return [round(float(share), 4) for share in mass / mass.sum()]
