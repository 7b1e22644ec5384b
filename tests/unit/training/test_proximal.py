"""FedProx: after each step, back towards the round's global parameters."""

import numpy as np
import pytest
import torch

from panfm.training.schedules import warmup_cosine
from panfm.training.trainer import Trainer


def trained(run, store, num_steps: int) -> tuple[dict, dict]:
    """Parameters before and after a round."""
    trainer = Trainer(run)
    start = trainer.shared_state()
    trainer.load_shared(start)
    trainer.train(store, np.arange(12), first_step=0, num_steps=num_steps, site="a", round_number=1)
    return start, trainer.shared_state()


def test_one_step_by_hand(make_run, make_store):
    store = make_store(make_run())
    start, plain = trained(make_run(), store, 1)
    _, pulled = trained(make_run("proximal-mu = 20.0\n"), store, 1)
    share = 20.0 * 3e-3 * warmup_cosine(0.5 / 8, warmup=0.1)
    assert 0.01 < share < 1
    for name, value in pulled.items():
        torch.testing.assert_close(value - start[name], (1 - share) * (plain[name] - start[name]), rtol=1e-3, atol=1e-7)


def distance(start: dict, end: dict) -> float:
    return float(sum((end[name] - start[name]).square().sum() for name in start)) ** 0.5


@pytest.mark.parametrize("private", [False, True])
def test_the_stronger_the_nearer(make_run, make_store, private):
    store = make_store(make_run())
    extra = '[sharing]\nhead = "private"\n' if private else ""
    found = [distance(*trained(make_run(f"proximal-mu = {mu}\n{extra}"), store, 4)) for mu in (0.0, 10.0, 100.0)]
    assert found[0] > 1.05 * found[1] > 1.05**2 * found[2]


def test_private_parameters_are_not_pulled(make_run, make_store):
    store = make_store(make_run())
    private = '[sharing]\nhead = "private"\n'
    moved = []
    for mu in (0.0, 100.0):
        trainer = Trainer(make_run(f"proximal-mu = {mu}\n{private}"))
        start = trainer.private_state()
        trainer.load_shared(trainer.shared_state())
        trainer.train(store, np.arange(12), first_step=0, num_steps=1, site="a", round_number=1)
        end = trainer.private_state()
        heads = [name for name in start if name.startswith("student.")]
        moved.append({name: end[name] - start[name] for name in heads})
    assert moved[0]
    assert all(torch.equal(moved[0][name], moved[1][name]) for name in moved[0])


def test_without_global_parameters_there_is_no_pull(make_run, make_store):
    """A site that trains alone."""
    store, ends = make_store(make_run()), []
    for mu in (0.0, 100.0):
        trainer = Trainer(make_run(f"proximal-mu = {mu}\n"))
        trainer.train(store, np.arange(12), first_step=0, num_steps=2, site="a", round_number=1)
        ends.append(trainer.shared_state())
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
