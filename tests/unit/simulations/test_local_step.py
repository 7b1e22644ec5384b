"""The bench's arms: which products a step has, by hand, and steps that train."""

import pytest
import torch
from torch.nn import functional

from panfm.training.trainer import Trainer
from simulations.bench._steps import noise_store
from simulations.bench.local_step import PlainDense, Products, description


def test_products_are_noted_with_those_of_the_gradient():
    """A linear layer has one product, and one for each of the gradients of its weight and its input."""
    layer, x = torch.nn.Linear(4, 3), torch.ones(2, 4, requires_grad=True)
    products = Products()
    with products:
        layer(x).sum().backward()
    assert sorted((first[0], second[0]) for first, second in products.pairs) == [
        ((2, 3), (3, 4)),
        ((2, 4), (4, 3)),
        ((3, 2), (2, 4)),
    ]
    products.stop()
    assert products.take_step() >= 0.0


def test_attention_has_two_products_and_four_of_its_gradients():
    query, key, value = (torch.ones(1, 2, 5, 4, requires_grad=True) for _ in range(3))
    products = Products()
    with products:
        functional.scaled_dot_product_attention(query, key, value).sum().backward()
    assert len(products.pairs) == 6
    assert {pair[0][0] + pair[1][0] for pair in products.pairs} == {(2, 5, 4, 2, 4, 5), (2, 5, 5, 2, 5, 4)}


@pytest.mark.slow
def test_the_dense_arm_learns_and_computes_more_than_the_masked_one():
    run = description("nano", 12, 4)
    store = noise_store(run.streams, run.seed, 4, "test")
    trainer = Trainer(run)
    dense = PlainDense(run, trainer.patch_features(store))
    before = [parameter.clone() for parameter in dense.teacher.parameters()]
    masked, plain = Products.of_step(trainer, store), Products()
    with plain:
        dense.take_step()
    assert any(not torch.equal(old, new) for old, new in zip(before, dense.teacher.parameters(), strict=True))
    assert flops(masked) < 0.8 * flops(plain)


def flops(products):
    return sum(torch.Size(first[0]).numel() * second[0][-1] for first, second in products.pairs)
