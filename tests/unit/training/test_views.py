"""Views in the trainer, and the objectives that compare them: by hand, against slow loops, and after a resume."""

import itertools

import numpy as np
import pytest
import torch
from torch.nn import functional
from torch.testing import assert_close

from panfm.data.store import ImageStore, join_batches
from panfm.errors import ConfigError, DataError
from panfm.models.pooling import cls_and_mean
from panfm.privacy.patient_sums import patient_gradient
from panfm.privacy.private_step import clipped_sum
from panfm.training.draw_order import draw_order, stream_turns
from panfm.training.gradient import BatchGradient
from panfm.training.objectives.dino.objective import assign
from panfm.training.objectives.interface import student_output
from panfm.training.objectives.views.objective import correlation, low_deviation
from panfm.training.token_mask import TokenMask, draw_mask
from panfm.training.trainer import Trainer

AUGMENT = "[augment]\n"
RANDOM = '[masking]\npolicy = "random"\n'
VIEWS = '[objective]\nname = "views"\n' + RANDOM + AUGMENT
REGRESSION = '[objective]\nname = "view-regression"\n' + RANDOM + AUGMENT
DINO = '[objective]\nname = "dino"\nprototypes = 16\nviews = 2\n' + RANDOM + AUGMENT
LATENT = '[objective]\nname = "latent"\ncontent-share = {}\n' + RANDOM
PRIVATE = """[patient-dp]
epsilon = 8.0
delta = 1e-3
public-subjects = 50
noise-multiplier = 1.0
sample-rate = 0.25
clip-norm = 1000.0
"""


def source_of(trainer, store, round_number=1):
    inputs, everyone = trainer.training_inputs(store), np.arange(len(store.subjects))
    return BatchGradient(trainer, trainer.experts, inputs, everyone, site="a", round_number=round_number)


def step_output(trainer, store):
    [batch] = source_of(trainer, store).draw()
    return trainer.forward(batch, 0, moves_profile=True)


def train(trainer, store, *, first_step=0, round_number=1):
    everyone = np.arange(len(store.subjects))
    return trainer.train(store, everyone, first_step=first_step, num_steps=2, site="a", round_number=round_number)


def equal_states(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_vicreg_terms_of_a_hand_computed_batch():
    """Deviations 2 and 0.5 of two subjects a distance apart; the two features move together."""
    projected = torch.tensor([[0.0, 0.0], [2 * 2**0.5, 0.5 * 2**0.5]])
    assert_close(low_deviation(projected), torch.tensor((0.0 + (1 - (0.25 + 1e-4) ** 0.5)) / 2))
    assert_close(correlation(projected), torch.tensor(2 * (2 * 0.5) ** 2 / 2))
    uncorrelated = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    assert float(correlation(uncorrelated)) == pytest.approx(0.0, abs=1e-12)
    assert float(low_deviation(uncorrelated[:1])) == pytest.approx(0.99)


@torch.no_grad()
def test_the_loss_of_views_equals_slow_loops(make_run, make_store):
    trainer = Trainer(make_run(VIEWS))
    output = step_output(trainer, make_store(trainer.run, complete=True))
    pooled = cls_and_mean(output.student.encoded)
    z = trainer.model.heads.projector(pooled).double().view(2, 6, 128).numpy()
    of_batch = 0.0
    for view in z:
        of_batch += 25 * np.mean([max(0.0, 1 - (np.var(column, ddof=1) + 1e-4) ** 0.5) for column in view.T]) / 2
        covariance = np.cov(view.T)
        of_batch += sum(covariance[i, j] ** 2 for i, j in itertools.permutations(range(128), 2)) / 128
    for subject in range(6):
        expected = 25 * np.mean((z[0, subject] - z[1, subject]) ** 2) + of_batch
        assert float(output.losses[subject]) == pytest.approx(expected, rel=1e-4)


def test_cls_and_mean_leave_padding_out(make_run, make_store):
    trainer = Trainer(make_run())
    store = make_store(trainer.run, 6)
    encoded = trainer.model.encode(trainer.model.patch_features(store.batch(np.arange(6))))
    found = cls_and_mean(encoded)
    for subject in range(6):
        own = encoded.tokens[subject][encoded.layout.valid[subject]]
        assert_close(found[subject], torch.cat([encoded.cls[subject], own.mean(dim=0)]))


@torch.no_grad()
def test_the_loss_of_view_regression_equals_a_slow_loop(make_run, make_store):
    trainer = Trainer(make_run(REGRESSION))
    output = step_output(trainer, make_store(trainer.run))
    taught = trainer.teacher.encode(output.student.features)
    predicted = trainer.model.heads.view_predictor(cls_and_mean(output.student.encoded))
    for subject in range(6):
        distances = []
        for row, other in ((subject, 6 + subject), (6 + subject, subject)):
            tokens = taught.tokens[other][taught.layout.valid[other]].mean(dim=0)
            target = torch.cat([functional.layer_norm(part, (48,)) for part in (taught.cls[other], tokens)])
            distances.append(functional.smooth_l1_loss(predicted[row], target, beta=0.5))
        assert_close(output.losses[subject], torch.stack(distances).mean(), atol=1e-5, rtol=1e-5)


def test_dino_compares_cls_across_views_by_hand(make_run, make_store):
    """Prototypes lie along the axes, so an assignment is the softmax of a projected CLS of length one."""
    trainer = Trainer(make_run(DINO.replace("prototypes = 16", "prototypes = 48\nteacher-temperature = 1.0")))
    for heads in (trainer.model.heads, trainer.teacher.heads):
        heads.prototypes.weight.data = torch.eye(48)
        heads.project = torch.nn.Identity()
    store = make_store(trainer.run, 2, complete=True)
    features = trainer.model.patch_features(join_batches([store.batch([0, 1])] * 2))
    full = trainer.teacher.encode(features, keep_blocks=True)
    full.cls[:] = torch.eye(48)[:4]
    mask = TokenMask.of(full.layout, full.layout.valid & (full.layout.patch_index == 0))
    found = trainer.objective.targets(trainer.teacher, features, mask, full)["cls"]
    one, other = np.e / (np.e + 47), 1 / (np.e + 47)
    for row, axis in enumerate((2, 3, 0, 1)):
        expected = torch.full((48,), other)
        expected[axis] = one
        assert_close(found[row], expected)
    assert_close(trainer.objective.centres["cls"], torch.tensor([0.025] * 4 + [0.0] * 44))


@torch.no_grad()
def test_the_loss_of_dino_with_two_views_equals_a_slow_loop(make_run, make_store):
    trainer = Trainer(make_run(DINO))
    trainer.objective.load_state(
        {f"centre.{kind}": torch.linspace(-0.1, 0.1, 16) * scale for kind, scale in (("cls", 1), ("token", 2))}
    )
    centre = trainer.objective.state()
    output = step_output(trainer, make_store(trainer.run))
    student, full = output.student, trainer.teacher.encode(output.student.features)

    def entropy(prediction, target, kind):
        scores = assign(trainer.teacher, trainer.teacher.heads.project(target)) - centre[f"centre.{kind}"]
        log_q = (assign(trainer.model, prediction) / 0.1).log_softmax(-1)
        return -((scores / 0.04).softmax(-1) * log_q).sum(-1)

    for subject in range(6):
        of_views = []
        for row, other in ((subject, 6 + subject), (6 + subject, subject)):
            kept = student.mask.hidden.valid[row]
            tokens = entropy(
                student.predictions[row][kept], full.tokens[row][student.mask.hidden_column[row][kept]], "token"
            )
            cls = entropy(trainer.model.heads.project(student.encoded.cls[row]), full.cls[other], "cls")
            of_views.append(cls + (tokens.mean() if kept.any() else 0.0))
        assert_close(output.losses[subject], torch.stack(of_views).mean(), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_dino_does_not_mind_which_view_is_first_and_of_two_alike_it_sees_one(make_run, make_store):
    two, one = Trainer(make_run(DINO)), Trainer(make_run(DINO.replace("views = 2", "views = 1")))
    store = make_store(two.run, 4)
    batch = store.batch(np.arange(4))
    views = [two.augmentation.vary(batch, [torch.Generator().manual_seed(n) for n in range(4)]) for _ in range(2)]
    views[1] = two.augmentation.vary(views[1], [torch.Generator().manual_seed(n) for n in range(4, 8)])

    def losses(trainer, shown):
        features = trainer.model.patch_features(join_batches(shown))
        full = trainer.teacher.encode(features, keep_blocks=True)
        mask = TokenMask.of(full.layout, (full.layout.patch_index % 2 == 0) & full.layout.valid)
        trainer.objective.load_state({f"centre.{kind}": torch.zeros(16) for kind in ("cls", "token")})
        return trainer.losses(trainer.student_forward(features, mask), full)

    assert_close(losses(two, views), losses(two, views[::-1]))
    assert_close(losses(two, views[:1] * 2), losses(one, views[:1]))
    assert not torch.allclose(losses(two, views), losses(two, views[:1] * 2))


def test_two_views_of_dino_ask_for_augmentation_and_still_couple_patients(make_run):
    with pytest.raises(ConfigError, match=r'"dino" compares views, expected a table \[augment\]'):
        make_run(DINO.removesuffix(AUGMENT))
    with pytest.raises(ConfigError, match=r"objective\.views"):
        make_run(DINO.replace("views = 2", "views = 3"))
    [coupling] = make_run(DINO).objective.couplings()
    assert coupling.startswith('name: "dino" centres its targets over the batch')
    with pytest.raises(ConfigError, match="centres its targets over the batch"):
        Trainer(make_run(DINO + PRIVATE))


def test_a_batch_of_views_shows_one_stream_and_streams_take_turns(make_run, make_store):
    trainer = Trainer(make_run(VIEWS))
    source, shown = source_of(trainer, make_store(trainer.run)), []
    for _ in range(6):
        [batch] = source.draw()
        output = trainer.forward(batch, 0, moves_profile=True)
        [name] = output.student.features.images
        assert output.student.features.rows[name].tolist() == list(range(2 * len(batch.subjects)))
        assert not torch.equal(*output.student.features.images[name].chunk(2))
        shown.append(name)
    assert set(shown[:3]) == set(shown[3:]) == set(trainer.model.stream_names)


def test_with_pairs_the_two_views_may_show_two_streams_of_a_subject(make_run, make_store):
    run = make_run(VIEWS.replace('name = "views"', 'name = "views"\npairs = true'))
    store = make_store(run)
    order = draw_order(run, tuple(run.streams), store, np.arange(12), "a", 1)
    drawn = list(itertools.islice(order, 6))
    shown = {(*first, *second) for _, (first, second) in drawn}
    assert shown == {(name, name) for name in run.streams} | set(itertools.combinations(run.streams, 2))
    for subjects, views in drawn:
        for view in views:
            assert all(np.isin(subjects, store.rows[name]).all() for name in view)
    trainer = Trainer(run)
    output = step_output(trainer, store)
    assert torch.isfinite(output.losses).all()
    assert len(output.losses) * 2 == output.student.features.size


def test_subjects_that_share_no_stream_cannot_be_compared():
    images = {"brain-mr": np.zeros((1, 1, 8, 8, 4), np.float32), "eye-fundus": np.zeros((1, 3, 8, 8), np.float32)}
    rows = {"brain-mr": np.array([0]), "eye-fundus": np.array([1])}
    store = ImageStore(("a", "b"), ("train",) * 2, images, rows)
    with pytest.raises(DataError, match="no two subjects hold the same stream"):
        stream_turns(tuple(images), store, np.arange(2), pairs=True)


@pytest.mark.parametrize(
    "extra",
    [VIEWS, REGRESSION, DINO, AUGMENT, '[objective]\nname = "mae"\n' + AUGMENT],
)
def test_a_saved_round_goes_on_with_the_same_bits(make_run, make_store, extra):
    run = make_run(extra)
    store, whole = make_store(run), Trainer(run)
    first = train(whole, store)
    assert first.num_skipped == 0
    assert np.isfinite(first.loss)
    shared, private = whole.shared_state(), whole.private_state()
    train(whole, store, first_step=2, round_number=2)
    resumed = Trainer(run)
    resumed.load_shared(shared)
    resumed.load_private(private)
    train(resumed, store, first_step=2, round_number=2)
    assert equal_states(whole.shared_state(), resumed.shared_state())
    assert equal_states(whole.private_state(), resumed.private_state())


def test_augmented_images_differ_by_step_and_round_and_are_the_same_again(make_run, make_store):
    trainer = Trainer(make_run('[objective]\nname = "mae"\n' + RANDOM + AUGMENT))
    store = make_store(trainer.run, 6, complete=True)

    def features(round_number):
        source = source_of(trainer, store, round_number)
        for _ in range(2):
            [batch] = source.draw()
            output = trainer.forward(batch, 0, moves_profile=True)
            source.add(output)
            rows = np.argsort(batch.subjects)
            yield output.student.features.images["brain-mr"][rows]

    (first, second), (again, _), (other, _) = features(1), features(1), features(2)
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(
    ("extra", "is_needed"),
    [(LATENT.format(1.0), False), (LATENT.format(0.5), True), (VIEWS, False), (REGRESSION, True)],
)
def test_no_teacher_runs_that_nobody_asks_for(make_run, make_store, monkeypatch, extra, is_needed):
    trainer, calls = Trainer(make_run(extra)), []
    encode = trainer.teacher.encode
    monkeypatch.setattr(trainer.teacher, "encode", lambda *args, **more: calls.append(1) or encode(*args, **more))
    step_output(trainer, make_store(trainer.run))
    assert bool(calls) == is_needed


def test_contents_alone_are_the_targets_with_and_without_a_teacher(make_run, make_store):
    trainer = Trainer(make_run('[objective]\nname = "latent"\ncontent-share = 1.0\n' + RANDOM))
    store = make_store(trainer.run)
    found = step_output(trainer, store).losses
    other = Trainer(trainer.run)
    other.objective.needs_teacher = True
    assert torch.equal(found, step_output(other, store).losses)


def test_a_subject_counts_once_however_many_views_it_has(make_run, make_store):
    trainer = Trainer(make_run(VIEWS))
    store = make_store(trainer.run, 6, complete=True)
    result = train(trainer, store)
    assert all(sorted(batch) == list(range(6)) for batch in result.batches)
    assert set(result.contributors_per_stream.values()) <= {0, 6}  # two of three streams had a turn
    validation = trainer.validate(store, np.arange(6), site="a")
    assert validation.subjects == 6
    assert np.isfinite(validation.loss)


def test_experts_weigh_subjects_and_not_views(make_run, make_store):
    experts = '[model]\nbackbone = "director-experts"\n[model.experts]\ncount = 4\nactive = 2\n'
    trainer = Trainer(make_run(VIEWS + experts))
    result = train(trainer, make_store(trainer.run, 6, complete=True))
    assert [sum(mass) for mass in result.gate_mass.values()] == pytest.approx([12.0, 12.0], rel=1e-5)


def test_the_private_gradient_of_a_patient_is_that_of_its_own_views(make_run, make_store):
    """The sum over patients equals a loop over them, each augmented and masked by its own generator."""
    run = make_run(REGRESSION + PRIVATE)
    trainer, store = Trainer(run), make_store(run, 4)

    def draws(index):
        return torch.Generator().manual_seed(index)

    found = clipped_sum(trainer, store, np.arange(4), draws=draws)
    expected = {name: torch.zeros_like(value, dtype=torch.float64) for name, value in found.items()}
    for index in range(4):
        generator, batch = draws(index), store.batch([index])
        views = [trainer.augmentation.vary(batch, [generator]) for _ in range(2)]
        features = trainer.model.patch_features(join_batches(views))
        layout = trainer.model.layout(features)
        mask = draw_mask(
            trainer.policy, torch.ones(1, 3), layout, trainer.model.stream_of_patch, step=0, generator=generator
        )
        targets = trainer.objective.targets(trainer.teacher, features, mask, trainer.teacher.encode(features))
        loss = trainer.objective.loss(trainer.model, student_output(trainer.model, features, mask), targets)
        assert loss.shape == (1,)
        gradient = patient_gradient(loss.sum(), dict(trainer.model.named_parameters()))
        for name, value in gradient.items():
            expected[name] += value.double()
    assert any(name.startswith("heads.view_predictor") and value.any() for name, value in found.items())
    for name, value in expected.items():
        assert_close(found[name], value, atol=1e-7, rtol=1e-5)
