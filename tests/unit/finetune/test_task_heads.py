"""Outputs, losses and initial parameters of task heads; a patient's outputs depend on no other patient."""

import numpy as np
import pytest
import torch

from panfm.config import StreamConfig, parse_run
from panfm.finetune.task_description import TaskDescription
from panfm.finetune.task_heads import LabelHead, SegmentationHead, build_head, predict_rows, upsampling_steps
from panfm.models import build_model

SEGMENTATION = TaskDescription(
    kind="segmentation", name="segmentation", outputs=("0", "7"), values=(0, 7), stream="brain-mr"
)


@pytest.mark.parametrize(
    ("patch", "steps"),
    [
        ((4, 4, 4), [(2, 2, 2), (2, 2, 2)]),
        ((16, 8, 4), [(2, 1, 1), (2, 2, 1), (2, 2, 2), (2, 2, 2)]),
        ((14, 14), [(7, 7), (2, 2)]),
        ((5, 6), [(1, 3), (5, 2)]),
        ((1, 1), [(1, 1)]),
    ],
)
def test_upsampling_steps(patch, steps):
    assert upsampling_steps(patch) == steps
    assert tuple(np.prod(steps, axis=0)) == patch


@pytest.mark.parametrize(
    ("shape", "patch"),
    [((8, 8, 4), (4, 4, 4)), ((10, 7, 6), (5, 7, 2)), ((28, 28), (14, 14)), ((4, 4), (1, 1)), ((4, 4), (4, 4))],
)
def test_a_decoder_fits_any_patch(shape, patch):
    spacing = (1.0,) * 3 if len(shape) == 3 else ()
    name = "brain-mr" if spacing else "eye-fundus"
    stream = StreamConfig(shape=shape, patch=patch, spacing_mm=spacing)
    run = parse_run(
        f'name = "x"\n[streams]\n{name} = {{ shape = {list(shape)}, patch = {list(patch)}'
        + (f", spacing-mm = {list(spacing)}" if spacing else "")
        + ' }\n[model]\ntokenizer = "patch"\n'
    )
    model = build_model(run)
    head = SegmentationHead(name, stream, model.width, 3)
    from panfm.data.store import Batch

    batch = Batch(2, {name: torch.rand(2, 1, *shape)}, {name: torch.arange(2)})
    outputs = head(model, batch)
    assert outputs.shape == (2, 3, *shape)
    head.loss(outputs, torch.zeros(2, *shape, dtype=torch.uint8)).backward()
    assert all(parameter.grad is not None for parameter in head.parameters())
    assert model.backbone.blocks[0].attention.qkv.weight.grad.abs().sum() > 0


def test_tokens_stand_in_their_places(make_run, make_store):
    """Whoever else is in the batch, and whatever other streams a patient has."""
    run = make_run()
    model, store = build_model(run).eval(), make_store(run, 6)
    head = build_head(model, SEGMENTATION, 0)
    rows = store.rows["brain-mr"]
    together = np.concatenate(list(predict_rows(head, model, store, rows)))
    alone = np.concatenate(list(predict_rows(head, model, store, rows, 1)))
    assert together.shape == (len(rows), 2, 8, 8, 4)
    assert together.sum(axis=1) == pytest.approx(np.ones((len(rows), 8, 8, 4)), abs=1e-5)
    assert together == pytest.approx(alone, abs=1e-5)


def test_the_loss_of_a_segmentation_by_hand():
    head = SegmentationHead("brain-mr", StreamConfig(shape=(2, 2), patch=(1, 1)), 4, 2)
    outputs, targets = torch.zeros(1, 2, 2, 2), torch.tensor([[[1, 0], [0, 0]]])
    dice = (2 * 0.5 + 1) / (4 * 0.5 + 1 + 1)
    assert head.loss(outputs, targets).item() == pytest.approx(np.log(2) + 1 - dice, abs=1e-6)


def test_a_segmentation_begins_at_the_shares_of_its_classes():
    """97 voxels of background, two of class 1, none of class 2; one is added to each count."""
    head = SegmentationHead("brain-mr", StreamConfig(shape=(4, 4), patch=(2, 2)), width=8, classes=3)
    head.start_at_shares(torch.tensor([0.0] * 97 + [1.0] * 2))
    torch.testing.assert_close(head.classify.bias.softmax(dim=0), torch.tensor([98.0, 3.0, 1.0]) / 102)


def test_losses_of_labels_by_hand():
    outputs = torch.tensor([[0.0], [2.0]])
    yes_no = LabelHead("yes-no", 3, 1)
    assert yes_no.loss(outputs, torch.tensor([[1.0], [torch.nan]])).item() == pytest.approx(np.log(2), abs=1e-6)
    classes = LabelHead("classes", 3, 2)
    assert classes.loss(torch.zeros(1, 2), torch.tensor([[0.0, 1.0]])).item() == pytest.approx(np.log(2), abs=1e-6)
    number = LabelHead("number", 3, 1)
    number.standardise(torch.eye(3), torch.tensor([[10.0], [30.0], [20.0]]))
    sd = np.sqrt(200 / 3)
    assert number.loss(torch.zeros(1, 1), torch.tensor([[30.0]])).item() == pytest.approx((10 / sd) ** 2, rel=1e-5)
    assert number.probabilities(torch.ones(1, 1)).item() == pytest.approx(20 + sd, rel=1e-5)


def test_a_head_is_drawn_by_seed(make_run):
    model = build_model(make_run())
    first, again, other = (build_head(model, SEGMENTATION, seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["classify.weight"], other["classify.weight"])


@pytest.mark.parametrize("kind", ["yes-no", "classes", "number", "survival"])
def test_a_label_head_starts_as_a_probe_whose_penalty_validation_chooses(kind):
    random = torch.Generator().manual_seed(0)
    values = 5.0 + 2.0 * torch.randn(90, 6, generator=random)
    signal = values[:, 0] - 5.0
    targets = {
        "yes-no": (signal > 0)[:, None],
        "classes": torch.stack([signal > 0, signal <= 0], dim=1),
        "number": 100.0 + 9.0 * signal[:, None],
        "survival": torch.stack([torch.ones(90), torch.exp(-signal)], dim=1),
    }[kind].float()
    head = LabelHead(kind, 6, 2 if kind == "classes" else 1)
    train, validation = ((values[part], targets[part]) for part in (slice(60), slice(60, 90)))
    head.standardise(*train)
    head.fit(train, validation)
    learned = head.linear.weight[0].abs()
    assert learned.argmax() == 0
    assert learned[0] > 5.0 * learned[1:].max()
    noise = validation[0][:, torch.randperm(6, generator=random)], validation[1].flip(0)
    head.fit(train, noise)
    assert head.linear.weight.abs().max() < learned.max() / 2
