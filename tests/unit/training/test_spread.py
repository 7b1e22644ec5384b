"""Two processes that split every batch take the steps of one process with the whole batch."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import distributed, multiprocessing

from panfm.config import parse_run
from panfm.data.store import ImageStore
from panfm.errors import LimitError
from panfm.training.objectives.latent import objective as latent
from panfm.training.spread import SpreadTrainer, check_spread
from panfm.training.trainer import Trainer
from tests.conftest import SMALL_RUN

EXPERTS = '[model]\nbackbone = "director-experts"\n[model.experts]\nbalance-weight = [0.1, 0.1]\n'
AUGMENT = "[augment]\nrotation = 0.1\nnoise = 0.1\n"
CASES = {
    "dense": '[masking]\nscope = "federation"\nsaliency = "value"\n',
    "experts": f'{EXPERTS}[masking]\nscope = "subject"\nsaliency = "value"\n',
    "dino": f'{EXPERTS}[objective]\nname = "dino"\nviews = 2\n{AUGMENT}',
    "mae": f'{EXPERTS}[objective]\nname = "mae"\n[masking]\npolicy = "organ"\n',
    "view-regression": f'[objective]\nname = "view-regression"\n{AUGMENT}',
    "fewer subjects than processes": f"{EXPERTS}",
}
RUN = SMALL_RUN.replace("batch-size = 6", "batch-size = 5")


def double(trainer: Trainer) -> Trainer:
    """The same trainer in float64."""
    trainer.model.double(), trainer.teacher.double()
    trainer.reset_private()
    trainer.profile = trainer.profile.double()
    if isinstance(trainer.objective, latent.LatentObjective):
        objective = trainer.objective
        objective.projections = {name: value.double() for name, value in objective.projections.items()}
    trainer.objective.load_state({name: value.double() for name, value in trainer.objective.state().items()})
    return trainer


@contextmanager
def in_float64() -> Iterator[None]:
    """Make float64 the usual type, also where a step asks for float32."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "float", lambda x: x.to(torch.float32 if x.dtype is torch.bool else torch.float64))
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(torch.float32)


@in_float64()
def trained(kind: type[Trainer], case: str) -> tuple[dict[str, torch.Tensor], object]:
    """State and result after a round of three steps in float64 on subjects that lack streams."""
    torch.set_num_threads(1)
    run, random = parse_run(RUN + CASES[case]), np.random.default_rng(3)
    subjects = 1 if "fewer" in case else 9
    present = random.random((subjects, 3)) < 0.7
    present[:, 0] |= ~present.any(axis=1)
    rows = {name: np.flatnonzero(present[:, index]) for index, name in enumerate(run.streams)}
    images = {
        name: random.random((len(rows[name]), stream.channels, *stream.shape)) for name, stream in run.streams.items()
    }
    rows = {name: held for name, held in rows.items() if len(held)}
    store = ImageStore(
        tuple(map(str, range(subjects))), ("train",) * subjects, {name: images[name] for name in rows}, rows
    )
    trainer = double(kind(run, tuple(rows)))
    if distributed.is_initialized() and distributed.get_rank():
        for parameter in trainer.parameters:
            parameter.data.zero_()  # rank 0 has the state
    steps = {"first_step": 0, "num_steps": 3, "site": "a", "round_number": 1, "profile": {"brain-mr": 2.0}}
    result = trainer.train(store, np.arange(subjects), **steps)
    return trainer.shared_state() | trainer.private_state(), result


def work(rank: int, processes: int, folder: str, case: str) -> None:
    store = distributed.FileStore(f"{folder}/meet", processes)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=processes)
    torch.save(trained(SpreadTrainer, case), f"{folder}/{rank}")
    distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[pytest.mark.long] if "view" in CASES[case] else []) for case in CASES]
)
def test_two_processes_take_the_step_of_one(case, monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    expected, record = trained(Trainer, case)
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(work, (2, folder, case), nprocs=2)
        (state, found), (other, _) = (torch.load(Path(folder) / str(rank), weights_only=False) for rank in range(2))
    assert all(value.dtype == torch.float64 for name, value in expected.items() if ".weight" in name)
    for name, value in expected.items():
        torch.testing.assert_close(
            state[name], value, rtol=1e-10, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}"
        )
        assert torch.equal(state[name], other[name]), name
    assert found.batches == record.batches
    assert found.counted == record.counted
    assert found.contributors_per_stream == record.contributors_per_stream
    assert found.contributors_per_expert == record.contributors_per_expert
    assert found.loss == pytest.approx(record.loss, abs=1e-10)
    assert found.saliency == pytest.approx(record.saliency, abs=1e-10)
    for layer, mass in record.gate_mass.items():
        assert found.gate_mass[layer] == pytest.approx(mass, abs=1e-10)


@pytest.mark.parametrize(
    ("table", "word"),
    [
        ('[objective]\nname = "views"\n' + AUGMENT, "objective.name: views couples"),
        (
            "[patient-dp]\nepsilon = 8.0\ndelta = 1e-3\npublic-subjects = 32\nnoise-multiplier = 1.5\n"
            'sample-rate = 0.5\n[objective]\nstandardise = false\n[masking]\npolicy = "random"\n',
            "patient-dp: steps",
        ),
    ],
)
def test_what_cannot_be_split_is_refused(table, word):
    with pytest.raises(LimitError, match=word):
        check_spread(parse_run(RUN + table), 2)


@pytest.mark.parametrize("case", CASES)
def test_what_can_be_split_is_taken(case):
    check_spread(parse_run(RUN + CASES[case]), 2)
