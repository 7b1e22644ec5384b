"""Poolings: cases by hand, a slow reference, independence of padding, absent streams, and what is refused."""

import itertools

import numpy as np
import pytest
import torch
from torch.nn import functional
from torch.testing import assert_close

from panfm.config.features import FeaturesConfig
from panfm.data.store import Batch
from panfm.errors import ConfigError
from panfm.evaluate.pooling_option import parse_pooling
from panfm.models import build_model
from panfm.models.backbone import Encoded
from panfm.models.pooling import pool
from panfm.models.tokens import Layout

POOLINGS = [
    {"pooling": "cls"},
    {"pooling": "mean"},
    {"pooling": "cls+mean"},
    {"pooling": "per-stream"},
    {"pooling": "layers"},
    {"pooling": "layers", "layers": [2]},
    {"pooling": "per-stream-layers"},
    {"pooling": "per-stream-layers", "layers": [1]},
]


def features_of(**table):
    return FeaturesConfig.model_validate(table)


def encoded_of(tokens, valid, cls, *, garbage=float("nan"), blocks=(), block_cls=()):
    """A batch whose padded rows hold garbage."""
    tokens, valid = torch.as_tensor(tokens, dtype=torch.float64), torch.as_tensor(valid)
    tokens = tokens.masked_fill(~valid[:, :, None], garbage)
    layout = Layout(torch.zeros(valid.shape, dtype=torch.long), valid)
    return Encoded(torch.as_tensor(cls, dtype=torch.float64), tokens, layout, tuple(blocks), None, (), tuple(block_cls))


TOKENS = [[[1.0, 2.0], [3.0, 6.0], [5.0, 1.0]], [[7.0, 8.0], [0.0, 0.0], [0.0, 0.0]]]
VALID = [[True, True, True], [True, False, False]]
STREAM = torch.tensor([[0, 0, 2], [1, 0, 0]])
CLS = [[10.0, 20.0], [30.0, 40.0]]


@pytest.mark.parametrize(
    ("pooling", "expected"),
    [
        ("cls", CLS),
        ("mean", [[3.0, 3.0], [7.0, 8.0]]),
        ("cls+mean", [[10.0, 20.0, 3.0, 3.0], [30.0, 40.0, 7.0, 8.0]]),
        ("per-stream", [[10.0, 20.0, 2.0, 4.0, 0.0, 0.0, 5.0, 1.0], [30.0, 40.0, 0.0, 0.0, 7.0, 8.0, 0.0, 0.0]]),
    ],
)
def test_tokens_are_pooled_by_hand_and_padding_may_hold_nan(pooling, expected):
    pooled = pool(encoded_of(TOKENS, VALID, CLS), features_of(pooling=pooling), STREAM, 3)
    assert_close(pooled, torch.tensor(expected, dtype=torch.float64))


def test_layers_are_normalised_and_give_cls_mean_and_deviation_by_hand():
    tokens = torch.tensor([[[1.0, 3.0], [4.0, 2.0]]], dtype=torch.float64)  # normalised: (-1, 1) and (1, -1)
    cls = torch.tensor([[5.0, 9.0]], dtype=torch.float64)
    encoded = encoded_of(tokens, [[True, True]], cls, blocks=[tokens * 9, tokens], block_cls=[-cls, cls])
    pooled = pool(encoded, features_of(pooling="layers", layers=[2]), torch.zeros(1, 2, dtype=torch.long), 1)
    assert_close(pooled, torch.tensor([[-1.0, 1.0, 0.0, 0.0, 1.0, 1.0]], dtype=torch.float64), atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("table", POOLINGS)
def test_the_model_pools_as_a_slow_loop_does(make_run, make_store, table):
    run = make_run().model_copy(update={"features": features_of(**table)})
    model, store = build_model(run).double().eval(), make_store(run, 7)
    batch = store.batch(np.arange(7))
    batch = Batch(batch.size, {name: images.double() for name, images in batch.images.items()}, batch.rows)
    embedding = model.embed(batch)
    assert embedding.shape == (7, model.embedding_size)
    encoded = model.encode(model.patch_features(batch), keep_blocks=True)
    for subject in range(7):
        places = encoded.layout.valid[subject].nonzero().flatten().tolist()
        streams = [int(model.stream_of_patch[encoded.layout.patch_index[subject, place]]) for place in places]
        assert_close(embedding[subject], slow(encoded, subject, places, streams, **table), atol=1e-9, rtol=0)


def slow(encoded, subject, places, streams, pooling, layers=(1, 2)):
    parts = []
    if pooling == "per-stream-layers":
        for layer in layers:
            parts.append(functional.layer_norm(encoded.block_cls[layer - 1][subject], (48,), eps=1e-6))
            for wanted in range(3):
                rows = [
                    functional.layer_norm(encoded.blocks[layer - 1][subject, place], (48,), eps=1e-6)
                    for place, stream in zip(places, streams, strict=True)
                    if stream == wanted
                ]
                of_stream = torch.stack(rows) if rows else torch.zeros(1, 48, dtype=torch.float64)
                parts += [of_stream.mean(0), of_stream.std(0, correction=0)]
        return torch.cat(parts)
    if pooling == "layers":
        for layer in layers:
            cls, *rows = (
                functional.layer_norm(row, row.shape, eps=1e-6)
                for row in (
                    encoded.block_cls[layer - 1][subject],
                    *(encoded.blocks[layer - 1][subject, place] for place in places),
                )
            )
            tokens = torch.stack(rows)
            parts += [cls, tokens.mean(0), tokens.std(0, correction=0)]
        return torch.cat(parts)
    parts = [] if pooling == "mean" else [encoded.cls[subject]]
    chosen = {"cls": [], "mean": [set(streams)], "cls+mean": [set(streams)], "per-stream": [{0}, {1}, {2}]}[pooling]
    for wanted in chosen:
        rows = [
            encoded.tokens[subject, place] for place, stream in zip(places, streams, strict=True) if stream in wanted
        ]
        parts.append(torch.stack(rows).mean(0) if rows else torch.zeros_like(encoded.cls[subject]))
    return torch.cat(parts)


@torch.no_grad()
@pytest.mark.parametrize("table", POOLINGS)
def test_an_embedding_depends_on_no_other_subject_and_no_padding(make_run, make_store, table):
    run = make_run().model_copy(update={"features": features_of(**table)})
    model, store = build_model(run).double().eval(), make_store(run, 9)

    def embed(subjects):
        batch = store.batch(subjects)
        return model.embed(
            Batch(batch.size, {name: images.double() for name, images in batch.images.items()}, batch.rows)
        )

    together = embed(np.arange(9))
    for subject in range(9):
        assert_close(embed([subject])[0], together[subject], atol=1e-9, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("table", POOLINGS)
def test_a_subject_without_images_has_a_finite_embedding_of_the_same_size(make_run, table):
    run = make_run().model_copy(update={"features": features_of(**table)})
    model = build_model(run).eval()
    embedding = model.embed(Batch(2, {}, {}))
    assert embedding.shape == (2, model.embedding_size)
    assert torch.isfinite(embedding).all()
    assert torch.equal(embedding[0], embedding[1])


def test_absent_streams_are_zeros_and_leave_the_others_places_alone(make_run, make_store):
    run = make_run().model_copy(update={"features": features_of(pooling="per-stream")})
    model, store = build_model(run).eval(), make_store(run, 4, complete=True)
    for size in (1, 2):
        for names in itertools.combinations(run.streams, size):
            with torch.no_grad():
                blocks = model.embed(store.batch(np.arange(4), names)).unflatten(1, (4, model.width))
            is_zero = [bool((blocks[:, 1 + index] == 0).all()) for index in range(3)]
            assert is_zero == [name not in names for name in run.streams]


def test_the_default_is_cls_and_training_tensors_are_the_same_under_every_pooling(make_run, make_store):
    plain = make_run()
    assert plain.features == features_of(pooling="cls")
    batch = make_store(plain, 4).batch(np.arange(4))
    models = [build_model(plain.model_copy(update={"features": features_of(**table)})) for table in POOLINGS]
    with torch.no_grad():
        encoded = models[0].encode(models[0].patch_features(batch))
        assert torch.equal(models[0].embed(batch), encoded.cls)
    for model in models:
        assert model.state_dict().keys() == models[0].state_dict().keys()
        assert all(torch.equal(value, models[0].state_dict()[name]) for name, value in model.state_dict().items())


def test_a_block_that_is_not_there_and_a_backbone_without_cls_are_one_line(make_run):
    run = make_run().model_copy(update={"features": features_of(pooling="layers", layers=[1, 3])})
    with pytest.raises(ConfigError, match=r"^features\.layers: found block 3, expected 1 to 2$"):
        build_model(run)
    blocks = [torch.ones(1, 2, 2, dtype=torch.float64)]
    encoded = encoded_of([[[1.0, 2.0], [3.0, 4.0]]], [[True, True]], [[1.0, 2.0]], blocks=blocks)
    with pytest.raises(ConfigError, match=r"features\.pooling: the backbone tells no CLS of its blocks"):
        pool(encoded, features_of(pooling="layers"), torch.zeros(1, 2, dtype=torch.long), 1)


def test_pooling_flags_are_read_and_mistakes_are_one_line():
    texts = ["cls", "mean", "cls+mean", "per-stream", "layers", "layers:8,10,12", "per-stream-layers:1,2"]
    assert [parse_pooling(text).pooling_text for text in texts] == texts
    for wrong in ("", "max", "mean:1", "layers:", "layers:2,1", "layers:0", "layers:1,1", "layers:1.5", "layers:9999"):
        with pytest.raises(ConfigError, match=r"^--pooling: found .*, expected one of cls, mean, cls\+mean"):
            parse_pooling(wrong)
