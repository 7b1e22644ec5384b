from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from panfm.errors import ProtocolError
from panfm.sharing.coding import decode, encode, encode_with_feedback
from panfm.sharing.groups import GroupManifest
from strategies.round_messages import bytes_per_group
from tests.conftest import manifest_of

LOSSY = ["bf16", "int8"]


def backbone_of(*sizes: int) -> GroupManifest:
    return manifest_of({"backbone": {f"backbone.p{index}": (size,) for index, size in enumerate(sizes)}})


def back_and_forth(coding: str, manifest: GroupManifest, update: np.ndarray) -> np.ndarray:
    return decode(coding, manifest, encode(coding, manifest, {"backbone": update}))["backbone"]


def test_int8_by_hand():
    """Two parameters, two rows, two scales: 1/127 and 0."""
    manifest, update = backbone_of(3, 2), np.array([1.0, -0.5, 0.001, 0.0, -0.0], np.float32)
    arrays = encode("int8", manifest, {"backbone": update})
    assert arrays["backbone"].tolist() == [127, -64, 0, 0, 0]
    assert arrays["backbone/scale"].tolist() == [np.float32(1 / 127), 0.0]
    assert (arrays["backbone"].dtype, arrays["backbone/scale"].dtype) == (np.int8, np.float32)
    assert bytes_per_group(arrays) == {"backbone": 5 + 8}


def test_a_row_is_at_most_256_numbers_of_one_parameter():
    manifest = backbone_of(257, 0, 2)
    update = np.repeat(np.float32([1, 2, 3]), [256, 1, 2])
    arrays = encode("int8", manifest, {"backbone": update})
    np.testing.assert_allclose(arrays["backbone/scale"] * 127, [1, 2, 3])
    np.testing.assert_allclose(decode("int8", manifest, arrays)["backbone"], update, rtol=1e-6)


def test_bf16_by_hand():
    """Eight bits of mantissa; a tie goes to the even neighbour; NaN stays NaN whatever its bits."""
    update = np.array([1.0, -2.5, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, np.inf, -0.0], np.float32)
    wanted = np.array([1.0, -2.5, 1.0, 1 + 2**-6, 1 + 2**-7, np.inf, -0.0], np.float32)
    assert back_and_forth("bf16", backbone_of(7), update).tobytes() == wanted.tobytes()
    nans = np.array([0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001], np.uint32).view(np.float32)
    assert np.isnan(back_and_forth("bf16", backbone_of(3), nans)).all()


def test_bf16_is_torchs():
    import torch

    update = np.random.default_rng(0).integers(0, 2**31, 4000, dtype=np.uint32).view(np.float32)
    update = update[np.isfinite(update)]
    wanted = torch.from_numpy(update).bfloat16().float().numpy()
    assert back_and_forth("bf16", backbone_of(len(update)), update).tobytes() == wanted.tobytes()


updates = st.lists(st.integers(0, 300), min_size=1, max_size=4).flatmap(
    lambda sizes: st.tuples(st.just(sizes), st.integers(0, 2**32), st.integers(-46, 1))
)


@settings(max_examples=25)
@given(updates)
def test_error_bounds(case):
    """In rational numbers; magnitudes from below the smallest normal float to 64."""
    sizes, seed, exponent = case
    generator = np.random.default_rng(seed)
    values = generator.normal(size=sum(sizes)) * 10.0 ** generator.uniform(exponent - 3, exponent, size=sum(sizes))
    update = np.clip(values, -64, 64).astype(np.float32)
    manifest = backbone_of(*sizes)
    assert back_and_forth("float32", manifest, update).tobytes() == update.tobytes()
    smallest = Fraction(float(np.finfo(np.float32).tiny))
    found = back_and_forth("bf16", manifest, update)
    for wanted, arrived in zip(update.tolist(), found.tolist(), strict=True):
        assert abs(Fraction(arrived) - Fraction(wanted)) <= abs(Fraction(wanted)) / 2**8 + smallest / 2**7
    found = back_and_forth("int8", manifest, update)
    assert found.dtype == np.float32
    rows, start = [], 0
    for size in sizes:
        rows += [(start + low, start + min(low + 256, size)) for low in range(0, size, 256)]
        start += size
    for low, high in rows:
        step = Fraction(float(np.abs(update[low:high]).max())) / 127
        allowed = step / 2 * (1 + Fraction(1, 2**15)) + 127 * smallest
        errors = [
            abs(Fraction(a) - Fraction(b))
            for a, b in zip(found[low:high].tolist(), update[low:high].tolist(), strict=True)
        ]
        assert max(errors) <= allowed


@pytest.mark.parametrize("coding", LOSSY)
def test_what_arrives_adds_up_to_what_was_meant(coding):
    """A number far below its row's step arrives in the mean; without feedback (int8) it never does."""
    manifest, rounds = backbone_of(300), 200
    generator = np.random.default_rng(0)
    steady = (generator.normal(size=300) * 1e-4).astype(np.float32)
    steady[::100] = 1.0
    lost, arrived, alone = {}, np.zeros(300), np.zeros(300)
    for _ in range(rounds):
        arrays, lost = encode_with_feedback(coding, manifest, {"backbone": steady}, lost)
        arrived += decode(coding, manifest, arrays)["backbone"]
        alone += back_and_forth(coding, manifest, steady)
    error, without = (np.abs(total / rounds - steady).max() for total in (arrived, alone))
    np.testing.assert_allclose(arrived / rounds + lost["backbone"] / rounds, steady, atol=1e-6)
    assert error <= 0.005 / rounds + 1e-6
    if coding == "int8":
        assert without > 10 * error


def test_nothing_is_lost_without_rounding():
    manifest, update = backbone_of(2), np.array([0.1, 0.2], np.float32)
    arrays, lost = encode_with_feedback("float32", manifest, {"backbone": update}, {})
    assert arrays["backbone"] is update
    assert lost == {}


@pytest.mark.parametrize("coding", ["float32", *LOSSY])
def test_an_empty_group(coding):
    assert back_and_forth(coding, backbone_of(0), np.zeros(0, np.float32)).size == 0


@pytest.mark.parametrize("coding", LOSSY)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_still_not_when_it_arrives(coding, value):
    found = back_and_forth(coding, backbone_of(4), np.array([1, value, 2, 3], np.float32))
    assert not np.isfinite(found).all()


@pytest.mark.parametrize(
    ("coding", "changes", "why"),
    [
        ("int8", {"backbone/scale": None}, r"backbone/scale is nothing, expected float32 \[2\]"),
        ("int8", {"backbone/scale": np.zeros(3, np.float32)}, r"float32 \[3\], expected float32 \[2\]"),
        ("int8", {"backbone/scale": np.zeros(2)}, "float64"),
        ("int8", {"backbone": np.zeros(4, np.int8)}, r"backbone is int8 \[4\], expected int8 \[5\]"),
        ("int8", {"backbone": np.zeros(5, np.float32)}, "backbone is float32"),
        ("int8", {"backbone": np.zeros((5, 1), np.int8)}, r"int8 \[5, 1\]"),
        ("bf16", {"backbone": np.zeros(5, np.float32)}, r"expected uint16 \[5\]"),
        ("bf16", {"backbone": np.zeros(6, np.uint16)}, r"uint16 \[6\]"),
    ],
)
def test_what_is_malformed_is_refused(coding, changes, why):
    manifest = backbone_of(3, 2)
    arrays = dict(encode(coding, manifest, {"backbone": np.ones(5, np.float32)})) | changes
    with pytest.raises(ProtocolError, match=why):
        decode(coding, manifest, {name: array for name, array in arrays.items() if array is not None})


@pytest.mark.parametrize("coding", ["float32", *LOSSY])
def test_what_no_group_explains_comes_back_for_the_guards(coding):
    manifest, extra = backbone_of(1), np.zeros(2, np.int8)
    arrays = encode(coding, manifest, {"backbone": np.ones(1, np.float32)})
    found = decode(coding, manifest, {**arrays, "experts": extra, "head/scale": extra})
    assert found.keys() == {"backbone", "experts", "head/scale"}
