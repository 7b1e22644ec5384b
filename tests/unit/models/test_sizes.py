"""Counted sizes equal those of models that are built."""

import itertools

import pytest

from panfm.errors import LimitError
from panfm.models import build_model, sizes
from panfm.models.pan import describe_model
from panfm.models.sizes import sizes_of, tokens_per_patient

OBJECTIVES = ("latent", "dino", "mae")
MODELS = (
    'size = "nano"',
    'size = "tiny"\nhidden-multiple = 2',
    'tokenizer = "patch"',
    'backbone = "director-experts"\nexperts = { count = 5, active = 2 }',
    'backbone = "director-experts"\nhidden-multiple = 3\nexperts = { count = [3, 4], active = [1, 2] }',
)


@pytest.mark.parametrize(("objective", "model"), list(itertools.product(OBJECTIVES, MODELS)))
def test_the_count_is_that_of_the_model(make_run, objective, model):
    run = make_run(f'[objective]\nname = "{objective}"\n[model]\n{model}\n')
    assert sizes_of(run).parameters == sum(each.numel() for each in build_model(run).parameters())


def test_a_model_that_no_machine_holds_is_refused(make_run):
    run = make_run('[model]\nbackbone = "director-experts"\n')
    experts = run.model.experts.model_copy(update={"count": (2**60,)})
    model = run.model.model_copy(update={"hidden_multiple": 2**60, "experts": experts})
    with pytest.raises(LimitError, match=r"more than 2\^63 bytes"):
        sizes_of(run.model_copy(update={"model": model}))


def test_tokens_and_activations(make_run):
    run = make_run("[masking]\nratio = 0.5\n")
    assert tokens_per_patient(run.streams) == 2 * 2 * 1 + 2 * 1 * 1 + 2 * 2
    run = run.model_copy(update={"train": run.train.model_copy(update={"batch_size": 3})})
    block = 10 * 48 + 2 * 4 * 48 + 2 * 48
    patient = (0.5 * 11 + 1 + 3) * 2 * block + 11 * (block + 2 * 48 + 8 * 48)
    moments = (2 * 10 + 3) * (2 * 48 + 1)
    assert sizes_of(run).step_bytes == 4 * (3 * patient + 8 * sizes_of(run).parameters + moments)


def test_each_view_of_a_patient_counts(make_run):
    def per_patient(objective):
        run = make_run(f'[masking]\nratio = 0.5\n[objective]\nname = "{objective}"\n[augment]\n')
        sizes = (1, 2)
        trains = (run.train.model_copy(update={"batch_size": size}) for size in sizes)
        one, two = (sizes_of(run.model_copy(update={"train": train})).step_bytes for train in trains)
        return two - one

    block = 10 * 48 + 2 * 4 * 48 + 2 * 48
    view = (0.5 * 11 + 1 + 3) * 2 * block + 11 * (block + 2 * 48 + 8 * 48)
    assert per_patient("view-regression") == 4 * 2 * view
    assert per_patient("latent") == 4 * view


@pytest.mark.parametrize("active", [1, 8])
def test_experts_that_are_active_count_in_the_teacher_too(make_run, active):
    """Nearly all is hidden, so that little is left to the student."""
    pool = f"experts = {{ count = 8, active = {active} }}"
    run = make_run(f'[masking]\nratio = 0.99\n[model]\nbackbone = "director-experts"\n{pool}\n')
    teacher = 4 * run.train.batch_size * tokens_per_patient(run.streams) * active * 2 * 4 * 48
    assert sizes_of(run).step_bytes > teacher + 4 * 5 * sizes_of(run).parameters


def test_a_model_is_described_once_for_equal_runs(make_run, monkeypatch):
    described = []
    monkeypatch.setattr(sizes, "describe_model", lambda run: described.append(run) or describe_model(run))
    first, again, other = (make_run(f"[model]\nhidden-multiple = {multiple}\n") for multiple in (61, 61, 62))
    for run in (first, again, other):
        sizes_of(run)
    assert [run.model.hidden_multiple for run in described] == [61, 62]
