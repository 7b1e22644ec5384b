"""Membership inference: blind where nothing was learned, sure where patients were learned by heart."""

import numpy as np
import pytest
import torch

from panfm.errors import DataError
from panfm.models import build_model
from panfm.privacy.audit_membership import Place, audit_membership, patient_losses
from panfm.training.trainer import Trainer

STEPS = 400


def halves(store):
    """The first half are members."""
    number = len(store.subjects)
    return Place(store, np.arange(number // 2), np.arange(number // 2, number))


def test_the_same_model_twice_tells_nothing(make_run, make_store):
    run = make_run()
    state = build_model(run).state_dict()
    found = audit_membership(run, state, state, [halves(make_store(run, 40))], masks=2, bootstrap=50)
    assert (found.auc.value, found.members, found.others) == (0.5, 20, 20)


def test_an_unrelated_model_tells_nothing_either(make_run, make_store):
    run = make_run()
    other = build_model(run.model_copy(update={"seed": 8})).state_dict()
    found = audit_membership(run, build_model(run).state_dict(), other, [halves(make_store(run, 200))], masks=2)
    assert found.auc.low < 0.5 < found.auc.high


@pytest.mark.slow
def test_patients_that_were_learned_by_heart_are_found(make_run, make_store):
    run = make_run(
        '[objective]\nname = "mae"\n[model]\ntokenizer = "patch"\n[masking]\npolicy = "random"\nratio = 0.5\n'
    )
    train = run.train.model_copy(update={"rounds": 1, "local_steps": STEPS, "weight_decay": 0.0})
    store = make_store(run, 24, complete=True)
    place = halves(store)
    trainer = Trainer(run.model_copy(update={"train": train}))
    before = trainer.shared_state()
    trainer.train(store, place.members, first_step=0, num_steps=STEPS, site="a", round_number=1)
    found = audit_membership(run, before, trainer.shared_state(), [place, place], masks=4, bootstrap=200)
    assert found.auc.value > 0.8
    assert found.auc.low > 0.5
    assert found.members == found.others == 24
    turned = Place(store, place.others, place.members)
    assert audit_membership(run, before, trainer.shared_state(), [turned], masks=4, bootstrap=0).auc.value < 0.2


def test_a_loss_does_not_depend_on_who_else_is_asked(make_run, make_store):
    """One objective whose running statistics couple patients: they are off in an attack."""
    run = make_run()
    state, store = build_model(run).state_dict(), make_store(run, 10, complete=True)
    together = patient_losses(run, state, store, np.arange(10), masks=1)
    turned = patient_losses(run, state, store, np.arange(10)[::-1].copy(), masks=1)
    assert np.isfinite(together).all()
    assert together.std() > 0
    again = patient_losses(run, state, store, np.arange(10), masks=1)
    np.testing.assert_array_equal(together, again)
    assert not np.array_equal(together, turned[::-1])  # masks go by the order in a chunk


def test_sites_without_others_are_left_out_and_all_such_are_refused(make_run, make_store):
    run = make_run()
    state, store = build_model(run).state_dict(), make_store(run, 12)
    alone = Place.of(store)
    assert (len(alone.members), len(alone.others)) == (12, 0)
    found = audit_membership(run, state, state, [alone, halves(store)], masks=1, bootstrap=10)
    assert (found.members, found.others) == (6, 6)
    with pytest.raises(DataError, match="no site has patients in train and in another split"):
        audit_membership(run, state, state, [alone], masks=1)
    assert torch.is_tensor(next(iter(state.values())))
