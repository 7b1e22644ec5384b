import pytest
import torch

from panfm.models import PanModel, build_model
from panfm.models.start import load_with_fresh_private
from panfm.sharing.groups import split_state

DEX = '[model]\nbackbone = "director-experts"\nexperts = {{ count = [2, 3], active = 1 }}\n[sharing]\nexperts = "{}"\n'
DIRECTORS_PART = {"weight_in": "0.weight", "bias_in": "0.bias", "weight_out": "2.weight", "bias_out": "2.bias"}


@pytest.fixture
def make_model(make_run):
    """A Director-Experts model in which every number has moved from its start, and its run."""

    def make(experts: str, extra: str = "") -> tuple[PanModel, object]:
        run = make_run(DEX.format(experts) + extra)
        model = build_model(run)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for value in model.state_dict().values():
                value += torch.rand(value.shape, generator=generator)
        return model, run

    return make


def test_experts_are_the_directors_and_the_rest_is_seeded(make_model):
    trained, run = make_model("private", 'head = "private"\n')
    shared, private = split_state(run.sharing, trained.state_dict())
    assert any(name.startswith("heads.") for name in private)
    model = build_model(run)
    seeded = {name: value.clone() for name, value in model.state_dict().items()}
    load_with_fresh_private(model, run.sharing, shared, seeded)
    found = model.state_dict()
    for name in private:
        layer, _, part = name.partition(".experts.")
        if part:
            director = trained.state_dict()[f"{layer}.director.{DIRECTORS_PART[part]}"]
            assert all(torch.equal(expert, director) for expert in found[name]), name
        else:
            assert torch.equal(found[name], seeded[name]), name
    assert all(torch.equal(found[name], value) for name, value in shared.items())


@pytest.mark.parametrize("experts", ["pooled", "naive"])
def test_what_is_shared_is_never_replaced(make_model, experts):
    trained, run = make_model(experts)
    model = build_model(run)
    load_with_fresh_private(model, run.sharing, trained.state_dict(), model.state_dict())
    assert all(torch.equal(found, value) for found, value in zip(
        model.state_dict().values(), trained.state_dict().values(), strict=True
    ))  # fmt: skip
