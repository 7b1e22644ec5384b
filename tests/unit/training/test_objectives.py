"""The three objectives against slow references, and what they promise: a loss per subject, nothing between subjects."""

import numpy as np
import pytest
import torch
from torch.nn import functional
from torch.testing import assert_close

from panfm.data.store import Batch
from panfm.models.stems import patchify
from panfm.training import Learner
from panfm.training.latent import RunningMoments
from panfm.training.masking import draw_hidden
from panfm.training.objective import Split, masked_view

LATENT_PLAIN = '[objective]\nname = "latent"\nstandardise = false\ncontent-share = 0.0\n'
DINO = '[objective]\nname = "dino"\nprototypes = 16\n'
MAE = '[objective]\nname = "mae"\n'


def losses(learner, store, subjects, hidden=None):
    maps = learner.model.stem(store.batch(subjects))
    full = learner.teacher.encode(maps, keep_blocks=True)
    if hidden is None:
        hidden = fixed_hidden(full.layout)
    split = Split.of(full.layout, hidden)
    view = masked_view(learner.model, maps, split)
    targets = learner.objective.targets(learner.teacher, maps, split, full)
    return learner.objective.loss(learner.model, view, targets), view, full


def fixed_hidden(layout):
    """Every second place of the vocabulary: the same for a subject, whoever else is in the batch."""
    return (layout.place % 2 == 0) & layout.valid


@pytest.mark.parametrize("objective", [LATENT_PLAIN, MAE])
@torch.no_grad()
def test_a_subjects_loss_does_not_depend_on_the_rest_of_the_batch(make_run, make_store, objective):
    run = make_run(objective)
    learner, store = Learner(run), make_store(run, 6)
    together, _, _ = losses(learner, store, np.arange(6))
    for subject in range(6):
        assert_close(losses(learner, store, [subject])[0][0], together[subject], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("objective", ["", LATENT_PLAIN, DINO, MAE])
def test_the_student_never_sees_what_is_hidden(make_run, make_store, objective):
    """Content of a hidden stream changes neither what the student encodes nor what it guesses."""
    run = make_run(objective)
    learner, store = Learner(run), make_store(run, 4, complete=True)
    maps = learner.model.stem(store.batch(np.arange(4)))
    changed = Batch(4, maps.images | {"heart-ct": maps.images["heart-ct"] + 1.0}, maps.rows)
    layout = learner.model.layout(maps)
    hidden = learner.model.stream_of_place[layout.place] == 1
    first, second = (masked_view(learner.model, each, Split.of(layout, hidden)) for each in (maps, changed))
    assert torch.equal(first.seen.cls, second.seen.cls)
    assert torch.equal(first.guesses, second.guesses)


@torch.no_grad()
def test_latent_equals_a_slow_loop(make_run, make_store):
    run = make_run(LATENT_PLAIN)
    learner, store = Learner(run), make_store(run, 5)
    found, view, full = losses(learner, store, np.arange(5))
    for b in range(5):
        targets = torch.stack([functional.layer_norm(block[b], (48,)) for block in full.blocks]).mean(0)
        kept = view.split.hidden.valid[b]
        tokens = functional.smooth_l1_loss(view.guesses[b][kept], targets[view.split.hidden_column[b][kept]], beta=0.5)
        guesses, summary = learner.model.heads.summarise(view.seen.cls[b][None])[0], []
        stream = learner.model.stream_of_place[full.layout.place[b]]
        for index in stream[full.layout.valid[b]].unique():
            mean = targets[(stream == index) & full.layout.valid[b]].mean(0)
            summary.append(functional.smooth_l1_loss(guesses[index], mean, beta=0.5))
        assert_close(found[b], tokens + torch.stack(summary).mean(), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_contents_are_the_projected_stem_features_of_each_place(make_run, make_store):
    run = make_run("")
    learner, store = Learner(run), make_store(run, 5)
    maps = learner.model.stem(store.batch(np.arange(5)))
    layout, objective = learner.model.layout(maps), learner.objective
    found = objective._contents(learner.model, maps, layout)
    for name, images in maps.images.items():
        first = int((learner.model.stream_of_place < learner.model.stream_names.index(name)).sum())
        patches = patchify(images, learner.model.streams[name].step)
        for row, subject in enumerate(maps.rows[name].tolist()):
            column = int(torch.nonzero((layout.place[subject] == first + 1) & layout.valid[subject])[0])
            assert_close(found[subject, column], patches[row, 1] @ objective.projections[name])


@torch.no_grad()
def test_targets_mix_features_and_contents_by_their_share_of_the_variance(make_run, make_store):
    run = make_run('[objective]\nname = "latent"\nstandardise = false\ncontent-share = 0.36\n')
    learner, store = Learner(run), make_store(run, 5)
    maps = learner.model.stem(store.batch(np.arange(5)))
    full = learner.teacher.encode(maps, keep_blocks=True)
    features = torch.stack([functional.layer_norm(block, (48,)) for block in full.blocks]).mean(0)
    contents = learner.objective._contents(learner.teacher, maps, full.layout)
    found = learner.objective.targets(learner.teacher, maps, Split.of(full.layout, full.layout.valid), full)["places"]
    assert_close(found[full.layout.valid], (0.8 * features + 0.6 * contents)[full.layout.valid])


def test_a_sites_subset_projects_contents_like_the_whole_model(make_run):
    run = make_run("")
    whole, part = Learner(run).objective, Learner(run, ["heart-ct"]).objective
    assert torch.equal(whole.projections["heart-ct"], part.projections["heart-ct"])


@torch.no_grad()
def test_mae_equals_a_slow_loop(make_run, make_store):
    run = make_run(MAE + '[model]\ntokenizer = "patch"\n')
    learner, store = Learner(run), make_store(run, 5)
    found, view, _ = losses(learner, store, np.arange(5))
    image_row = {name: dict(zip(view.maps.rows[name].tolist(), range(99), strict=False)) for name in view.maps.rows}
    corners = {"brain-mr": [(0, 0, 0), (0, 4, 0), (4, 0, 0), (4, 4, 0)], "heart-ct": [(0, 0, 0), (4, 0, 0)]}
    corners["eye-fundus"] = [(0, 0), (0, 4), (4, 0), (4, 4)]
    places = [(name, corner) for name in learner.model.stream_names for corner in corners[name]]
    for b in range(5):
        errors = []
        for k in range(int(view.split.hidden.valid[b].sum())):
            name, corner = places[view.split.hidden.place[b, k]]
            image = view.maps.images[name][image_row[name][b]]
            patch = image[(slice(None), *(slice(c, c + 4) for c in corner))].flatten()
            patch = (patch - patch.mean()) / (patch.var(correction=0) + 1e-6).sqrt()
            head = learner.model.heads.streams[name]
            errors.append((head.decode(view.guesses[b, k]) - patch).square().mean())
        assert_close(found[b], torch.stack(errors).mean(), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_dino_equals_a_slow_loop_and_moves_its_centre(make_run, make_store):
    run = make_run(DINO)
    learner, store = Learner(run), make_store(run, 5)
    centre = learner.objective.centres["cls"].clone()
    found, view, full = losses(learner, store, np.arange(5))
    student, teacher = learner.model.heads, learner.teacher.heads

    def entropy(guess, target):
        wanted = (teacher.assign(teacher.project(target)) / 0.04).softmax(-1)
        return -(wanted * (student.assign(guess) / 0.1).log_softmax(-1)).sum(-1)

    for b in range(5):
        kept = view.split.hidden.valid[b]
        tokens = entropy(view.guesses[b][kept], full.tokens[b][view.split.hidden_column[b][kept]]).mean()
        expected = entropy(student.project(view.seen.cls[b]), full.cls[b]) + tokens
        assert_close(found[b], expected, atol=1e-4, rtol=1e-4)
    moved = 0.1 * teacher.assign(teacher.project(full.cls)).mean(0)
    assert_close(learner.objective.centres["cls"], centre + moved)


@torch.no_grad()
def test_dino_targets_are_centred(make_run, make_store):
    run = make_run(DINO)
    learner, store = Learner(run), make_store(run, 5)
    maps = learner.model.stem(store.batch(np.arange(5)))
    full, heads = learner.teacher.encode(maps, keep_blocks=True), learner.teacher.heads
    centre = torch.linspace(-0.1, 0.1, 16)
    learner.objective.load_state({"centre.cls": centre, "centre.token": centre})
    found = learner.objective.targets(learner.teacher, maps, Split.of(full.layout, fixed_hidden(full.layout)), full)
    assert_close(found["cls"], ((heads.assign(heads.project(full.cls)) - centre) / 0.04).softmax(-1))


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
    learner, store = Learner(run), make_store(run, 14)
    before = learner.shared_state()
    result = learner.train(store, np.arange(14), first_step=1, num_steps=3, site="a", round_number=1)
    assert result.num_skipped == 0
    assert np.isfinite(result.loss)
    assert any(not torch.equal(value, before[name]) for name, value in learner.shared_state().items())


def test_the_hidden_budget_reaches_the_view(make_run, make_store):
    run = make_run()
    learner, store = Learner(run), make_store(run, 5)
    maps = learner.model.stem(store.batch(np.arange(5)))
    layout = learner.model.layout(maps)
    scores, masks = torch.zeros(1, 3), torch.Generator().manual_seed(0)
    hidden = draw_hidden(run.masking, scores, layout, learner.model.stream_of_place, masks)
    view = masked_view(learner.model, maps, Split.of(layout, hidden))
    assert torch.equal(view.split.hidden.valid.sum(1) + view.seen.layout.valid.sum(1), layout.valid.sum(1))
