"""Attention finds the token that tells the label, where their mean does not."""

import numpy as np
import pytest
import torch

from panfm.evaluate.attentive_probe import TokenReader, attentive
from panfm.evaluate.scores import auc
from panfm.models import build_model


def marked(number, seed, tokens=12):
    """Tokens of noise, of which one, in a random place, has a mark and the label; some tokens are not there."""
    random = np.random.default_rng(seed)
    values = random.normal(size=(number, tokens, 9))
    values[..., 0] = random.random((number, tokens)) < 0.8
    labels = random.integers(0, 2, number).astype(float)
    for row, label in enumerate(labels):
        place = random.integers(tokens)
        values[row, place] = [1.0, 8.0, 6.0 * label - 3.0, *values[row, place, 3:]]
    values[..., 1:] *= values[..., :1]
    return values, labels


@pytest.mark.slow
def test_a_marked_token_is_found():
    (fit, labels), (test, truth) = marked(300, 0), marked(100, 1)
    predicted = attentive(fit, labels, test, "sick", is_number=False)
    assert auc(predicted.scores, truth == 1.0, np.ones((1, 100)))[0] > 0.95
    again = attentive(fit, labels, test, "sick", is_number=False)
    assert np.array_equal(predicted.scores, again.scores)
    size = attentive(fit, 50.0 + 10.0 * labels, test, "size", is_number=True).scores
    assert size[truth == 1.0].mean() - size[truth == 0.0].mean() > 5.0


def test_what_cannot_be_fitted():
    values, labels = marked(20, 0)
    nothing = attentive(values, np.ones(20), values, "sick", is_number=False)
    assert np.isnan(nothing.scores).all()
    assert nothing.notes == ("sick: not probed, fit subjects are all of one class",)
    labels[11:], labels[:3] = np.nan, np.nan
    few = attentive(values, labels, values, "sick", is_number=False)
    assert np.isnan(few.scores).all()
    assert few.notes == ("sick: not probed, known for fewer than 10 fit subjects",)


def test_tokens_stand_at_their_patches(make_run, make_store):
    run = make_run()
    model, store = build_model(run).eval(), make_store(run, 6)
    with torch.inference_mode():
        tokens = TokenReader(model).embed(store.batch(range(6)))
    assert tokens.shape == (6, len(model.stream_of_patch), 49)
    for number, name in enumerate(model.stream_names):
        is_there = tokens[:, model.stream_of_patch == number, 0] == 1.0
        assert torch.equal(is_there.any(dim=1), is_there.all(dim=1))
        assert torch.nonzero(is_there.all(dim=1))[:, 0].tolist() == store.rows[name].tolist()
