"""The closed-form inversion: exact on one patient's gradient, and nothing under noise."""

import numpy as np
import pytest
import torch

from panfm.data.store import ImageStore
from panfm.errors import DataError
from panfm.models import build_model
from panfm.models.patch_features import patchify
from panfm.privacy.audit_inversion import Attacked, audit_inversion, invert

PATCH = '[model]\ntokenizer = "patch"\n'


def pictures(run, make_store, number=6):
    """Complete patients, all with a validation split of one."""
    store = make_store(run, number, complete=True)
    return ImageStore(store.subjects, ("train",) * (number - 1) + ("val",), store.images, store.rows)


@pytest.mark.parametrize("tokenizer", ["", PATCH])
def test_patches_that_were_seen_come_back_and_the_mask_with_them(make_private, make_store, fixed_masks, tokenizer):
    """`fixed_masks` hides every second place, so 0, 2, ... of the vocabulary are seen."""
    run = make_private(extra=tokenizer)
    attacked = Attacked(build_model(run), run, [pictures(run, make_store)])
    with torch.no_grad():  # norms as after some training
        block = attacked.trainer.model.backbone.blocks[0]
        block.norm1.bias.add_(0.1 * torch.randn(48, generator=torch.Generator().manual_seed(0)))
        block.norm1.weight.mul_(1.3)
    found = invert(attacked.trainer.model, attacked.gradient([(0, 1)]))
    features, first = attacked.features[0].batch([1]), 0
    assert found.keys() == set(run.streams)
    for name, (patches, over) in found.items():
        true = patchify(features.images[name], attacked.trainer.model.streams[name].step)[0].double()
        seen = torch.tensor([(first + place) % 2 == 0 for place in range(len(true))])
        first += len(true)
        assert (over[seen] < 1e-3).all()
        assert (over[~seen] > 1e-2).all()
        error = (patches[seen] - true[seen]).norm() / true[seen].norm()
        assert error < 1e-3
        assert (patches[~seen] - true[~seen]).norm() > 0.1 * true[~seen].norm()


@pytest.mark.slow
def test_clipping_does_not_help_and_noise_does(make_private, make_store):
    """One draw of the masks in forty hides too much of a patient: the median holds unless five of eight are such."""
    run = make_private(clip=1e-3, extra=PATCH)
    stores = [pictures(run, make_store), pictures(run, lambda *args, **more: make_store(*args, seed=1, **more))]
    found = {each.name: each for each in audit_inversion(build_model(run), run, stores, patients=8)}
    assert list(found) == [
        "one patient",
        "one patient, as AdamW moves the model",
        "sum over 8 patients",
        "sum over sites, one patient each",
        "one patient, noise 0.001",
        "one patient, noise 1",
    ]
    assert len(found["one patient"].psnr) == 8
    assert np.median(found["one patient"].psnr) > 60.0
    for name in ("one patient, noise 0.001", "one patient, noise 1"):
        assert np.median(found[name].psnr) < np.median(found[name].grey) + 1.0
    assert all(5.0 < value < 20.0 for each in found.values() for value in (*each.grey, *each.other))


def test_what_is_frozen_gives_nothing_away(make_private, make_store):
    """Without gradients of the patch layers there is nothing to invert; the guess is a grey."""
    run = make_private(extra='[train.parts]\nkind = "last-blocks"\nblocks = 1\n')
    attacked = Attacked(build_model(run), run, [pictures(run, make_store)])
    assert invert(attacked.trainer.model, attacked.gradient([(0, 1)])) == {}
    first, *_ = audit_inversion(build_model(run), run, [pictures(run, make_store)], patients=2)
    assert first.psnr == first.grey


def test_the_model_is_as_it_was_after_an_update_was_tried(make_private, make_store):
    run = make_private()
    model = build_model(run)
    attacked = Attacked(model, run, [pictures(run, make_store)])
    moved = attacked.adamw_update([(0, 0)])
    assert any(value.any() for value in moved.values())
    for name, value in attacked.trainer.model.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name


def test_a_site_that_holds_no_stream_of_the_model_is_told(make_private, make_store):
    run = make_private()
    store = pictures(run, make_store)
    empty = ImageStore(store.subjects, store.splits, {}, {})
    with pytest.raises(DataError, match="no patient in the train split holds a stream"):
        audit_inversion(build_model(run), run, [empty])
