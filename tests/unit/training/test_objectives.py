"""The three objectives against slow references, and what they promise: a loss per subject, nothing between subjects."""

import numpy as np
import pytest
import torch
from torch.nn import functional
from torch.testing import assert_close

from panfm.data.store import Batch
from panfm.models.stems import patchify
from panfm.training.objectives.dino.objective import assign
from panfm.training.objectives.interface import student_output
from panfm.training.objectives.latent.objective import RunningMoments
from panfm.training.token_mask import TokenMask, build_policy, draw_mask
from panfm.training.trainer import Trainer

LATENT_PLAIN = '[objective]\nname = "latent"\nstandardise = false\ncontent-share = 0.0\n'
DINO = '[objective]\nname = "dino"\nprototypes = 16\n'
MAE = '[objective]\nname = "mae"\n'


def losses(trainer, store, subjects, hidden=None):
    maps = trainer.model.stem(store.batch(subjects))
    full = trainer.teacher.encode(maps, keep_blocks=True)
    if hidden is None:
        hidden = fixed_hidden(full.layout)
    output = student_output(trainer.model, maps, TokenMask.of(full.layout, hidden))
    return trainer.losses(output, full), output, full


def fixed_hidden(layout):
    """Every second place of the vocabulary: the same for a subject, whoever else is in the batch."""
    return (layout.place % 2 == 0) & layout.valid


@pytest.mark.parametrize("objective", [LATENT_PLAIN, MAE])
@torch.no_grad()
def test_a_subjects_loss_does_not_depend_on_the_rest_of_the_batch(make_run, make_store, objective):
    run = make_run(objective)
    trainer, store = Trainer(run), make_store(run, 6)
    together, _, _ = losses(trainer, store, np.arange(6))
    for subject in range(6):
        assert_close(losses(trainer, store, [subject])[0][0], together[subject], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("objective", ["", LATENT_PLAIN, DINO, MAE])
def test_the_student_never_sees_what_is_hidden(make_run, make_store, objective):
    """Content of a hidden stream changes neither what the student encodes nor what it guesses."""
    run = make_run(objective)
    trainer, store = Trainer(run), make_store(run, 4, complete=True)
    maps = trainer.model.stem(store.batch(np.arange(4)))
    changed = Batch(4, maps.images | {"heart-ct": maps.images["heart-ct"] + 1.0}, maps.rows)
    layout = trainer.model.layout(maps)
    hidden = trainer.model.stream_of_place[layout.place] == 1
    first, second = (student_output(trainer.model, each, TokenMask.of(layout, hidden)) for each in (maps, changed))
    assert torch.equal(first.encoded.cls, second.encoded.cls)
    assert torch.equal(first.predictions, second.predictions)


@torch.no_grad()
def test_latent_equals_a_slow_loop(make_run, make_store):
    run = make_run(LATENT_PLAIN)
    trainer, store = Trainer(run), make_store(run, 5)
    found, output, full = losses(trainer, store, np.arange(5))
    for b in range(5):
        targets = torch.stack([functional.layer_norm(block[b], (48,)) for block in full.blocks]).mean(0)
        kept = output.mask.hidden.valid[b]
        tokens = functional.smooth_l1_loss(
            output.predictions[b][kept], targets[output.mask.hidden_column[b][kept]], beta=0.5
        )
        guesses, summary = trainer.model.heads.summarise(output.encoded.cls[b][None])[0], []
        stream = trainer.model.stream_of_place[full.layout.place[b]]
        for index in stream[full.layout.valid[b]].unique():
            mean = targets[(stream == index) & full.layout.valid[b]].mean(0)
            summary.append(functional.smooth_l1_loss(guesses[index], mean, beta=0.5))
        assert_close(found[b], tokens + torch.stack(summary).mean(), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_contents_are_the_projected_stem_features_of_each_place(make_run, make_store):
    run = make_run("")
    trainer, store = Trainer(run), make_store(run, 5)
    maps = trainer.model.stem(store.batch(np.arange(5)))
    layout, objective = trainer.model.layout(maps), trainer.objective
    found = objective._contents(trainer.model, maps, layout)
    for name, images in maps.images.items():
        first = int((trainer.model.stream_of_place < trainer.model.stream_names.index(name)).sum())
        patches = patchify(images, trainer.model.streams[name].step)
        for row, subject in enumerate(maps.rows[name].tolist()):
            column = int(torch.nonzero((layout.place[subject] == first + 1) & layout.valid[subject])[0])
            assert_close(found[subject, column], patches[row, 1] @ objective.projections[name])


@torch.no_grad()
def test_targets_mix_features_and_contents_by_their_share_of_the_variance(make_run, make_store):
    run = make_run('[objective]\nname = "latent"\nstandardise = false\ncontent-share = 0.36\n')
    trainer, store = Trainer(run), make_store(run, 5)
    maps = trainer.model.stem(store.batch(np.arange(5)))
    full = trainer.teacher.encode(maps, keep_blocks=True)
    features = torch.stack([functional.layer_norm(block, (48,)) for block in full.blocks]).mean(0)
    contents = trainer.objective._contents(trainer.teacher, maps, full.layout)
    found = trainer.objective.targets(trainer.teacher, maps, TokenMask.of(full.layout, full.layout.valid), full)[
        "places"
    ]
    assert_close(found[full.layout.valid], (0.8 * features + 0.6 * contents)[full.layout.valid])


def test_a_sites_subset_projects_contents_like_the_whole_model(make_run):
    run = make_run("")
    whole, part = Trainer(run).objective, Trainer(run, ["heart-ct"]).objective
    assert torch.equal(whole.projections["heart-ct"], part.projections["heart-ct"])


@torch.no_grad()
def test_mae_equals_a_slow_loop(make_run, make_store):
    run = make_run(MAE + '[model]\ntokenizer = "patch"\n')
    trainer, store = Trainer(run), make_store(run, 5)
    found, output, _ = losses(trainer, store, np.arange(5))
    image_row = {name: dict(zip(output.maps.rows[name].tolist(), range(99), strict=False)) for name in output.maps.rows}
    corners = {"brain-mr": [(0, 0, 0), (0, 4, 0), (4, 0, 0), (4, 4, 0)], "heart-ct": [(0, 0, 0), (4, 0, 0)]}
    corners["eye-fundus"] = [(0, 0), (0, 4), (4, 0), (4, 4)]
    places = [(name, corner) for name in trainer.model.stream_names for corner in corners[name]]
    for b in range(5):
        errors = []
        for k in range(int(output.mask.hidden.valid[b].sum())):
            name, corner = places[output.mask.hidden.place[b, k]]
            image = output.maps.images[name][image_row[name][b]]
            patch = image[(slice(None), *(slice(c, c + 4) for c in corner))].flatten()
            patch = (patch - patch.mean()) / (patch.var(correction=0) + 1e-6).sqrt()
            head = trainer.model.heads.streams[name]
            errors.append((head.decode(output.predictions[b, k]) - patch).square().mean())
        assert_close(found[b], torch.stack(errors).mean(), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_dino_equals_a_slow_loop_and_moves_its_centre(make_run, make_store):
    run = make_run(DINO)
    trainer, store = Trainer(run), make_store(run, 5)
    centre = trainer.objective.centres["cls"].clone()
    found, output, full = losses(trainer, store, np.arange(5))
    student, teacher = trainer.model.heads, trainer.teacher.heads

    def entropy(prediction, target):
        wanted = (assign(trainer.teacher, teacher.project(target)) / 0.04).softmax(-1)
        return -(wanted * (assign(trainer.model, prediction) / 0.1).log_softmax(-1)).sum(-1)

    for b in range(5):
        kept = output.mask.hidden.valid[b]
        tokens = entropy(output.predictions[b][kept], full.tokens[b][output.mask.hidden_column[b][kept]]).mean()
        expected = entropy(student.project(output.encoded.cls[b]), full.cls[b]) + tokens
        assert_close(found[b], expected, atol=1e-4, rtol=1e-4)
    moved = 0.1 * assign(trainer.teacher, teacher.project(full.cls)).mean(0)
    assert_close(trainer.objective.centres["cls"], centre + moved)


@torch.no_grad()
def test_dino_targets_are_centred(make_run, make_store):
    run = make_run(DINO)
    trainer, store = Trainer(run), make_store(run, 5)
    maps = trainer.model.stem(store.batch(np.arange(5)))
    full, heads = trainer.teacher.encode(maps, keep_blocks=True), trainer.teacher.heads
    centre = torch.linspace(-0.1, 0.1, 16)
    trainer.objective.load_state({"centre.cls": centre, "centre.token": centre})
    found = trainer.objective.targets(trainer.teacher, maps, TokenMask.of(full.layout, fixed_hidden(full.layout)), full)
    assert_close(found["cls"], ((assign(trainer.teacher, heads.project(full.cls)) - centre) / 0.04).softmax(-1))


def test_running_moments_equal_plain_ones_at_first_and_skip_absent_rows():
    moments = RunningMoments(2, 3)
    values = torch.randn(50, 2, 3, generator=torch.Generator().manual_seed(0)) * 2 + 1
    for start in range(0, 50, 10):
        moments.update(values[start : start + 10], torch.tensor([[True, False]] * 10))
    assert_close(moments.mean[0], values[:, 0].mean(0))
    assert_close(moments.square[0], values[:, 0].square().mean(0))
    assert moments.count.flatten().tolist() == [5, 0]
    standard = moments.standardise(values)[:, 0]
    assert_close(standard.std(0, correction=0), torch.ones(3), atol=1e-2, rtol=0)


@pytest.mark.parametrize("policy", ["random", "organ", "sgm", "inverse", "static"])
@pytest.mark.parametrize("objective", ["", DINO, MAE])
def test_every_policy_trains_under_every_objective(make_run, make_store, policy, objective):
    run = make_run(f'{objective}[masking]\npolicy = "{policy}"\nstatic-organs = ["heart"]\n')
    trainer, store = Trainer(run), make_store(run, 14)
    before = trainer.shared_state()
    result = trainer.train(store, np.arange(14), first_step=1, num_steps=3, site="a", round_number=1)
    assert result.num_skipped == 0
    assert np.isfinite(result.loss)
    assert any(not torch.equal(value, before[name]) for name, value in trainer.shared_state().items())


def test_the_hidden_budget_reaches_the_view(make_run, make_store):
    run = make_run()
    trainer, store = Trainer(run), make_store(run, 5)
    maps = trainer.model.stem(store.batch(np.arange(5)))
    layout = trainer.model.layout(maps)
    policy, generator = build_policy(run.masking, trainer.model.stream_organs), torch.Generator().manual_seed(0)
    mask = draw_mask(policy, torch.ones(1, 3), layout, trainer.model.stream_of_place, step=0, generator=generator)
    output = student_output(trainer.model, maps, mask)
    assert torch.equal(output.mask.hidden.valid.sum(1) + output.encoded.layout.valid.sum(1), layout.valid.sum(1))
