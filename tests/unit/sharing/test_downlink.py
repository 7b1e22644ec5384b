"""Steps of the global parameters: the same bits at both ends, nothing lost for good, nobody moved who did not train."""

import numpy as np
import pytest

from panfm.errors import ProtocolError
from panfm.sharing.coding import decode, digests, take_step
from strategies.round_messages import code_step
from tests.conftest import manifest_of

MANIFEST = manifest_of({"backbone": {"backbone.a": (300,)}, "head": {"heads.b": (4,)}})
CODINGS = ("bf16", "int8")


def drawn(seed: int, size: int, scale: float = 1.0) -> np.ndarray:
    return (np.random.default_rng(seed).normal(size=size) * scale).astype(np.float32)


def test_by_hand():
    """Scale 1: steps of whole numbers arrive as they are; a group without a step stays."""
    step = np.array([127, -2, 0, 1], np.float32)
    arrays, lost = code_step("int8", MANIFEST, "head", step, {})
    assert arrays["head"].tolist() == [127, -2, 0, 1]
    groups = {"head": np.array([1, 2, 3, 4], np.float32), "backbone": drawn(0, 300)}
    moved = take_step("int8", MANIFEST, groups, arrays)
    assert moved["head"].tolist() == [128, 0, 3, 5]
    assert moved["backbone"] is groups["backbone"]
    assert groups["head"].tolist() == [1, 2, 3, 4]
    assert lost["head"].tolist() == [0] * 4


@pytest.mark.parametrize("coding", CODINGS)
def test_the_server_and_a_site_that_takes_every_step_stay_together_and_near_the_exact_sum(coding):
    """Fifty rounds; without what was lost being made up for, the distance would grow."""
    start = {"backbone": drawn(1, 300)}
    server, site, exact, lost, careless = start, start, start["backbone"].astype(np.float64), {}, start
    for number in range(50):
        step = drawn(100 + number, 300, 1e-3) + np.float32(3e-6)
        exact += step
        arrays, lost = code_step(coding, MANIFEST, "backbone", step, lost)
        server = take_step(coding, MANIFEST, server, arrays)
        site = take_step(coding, MANIFEST, site, arrays)
        careless = take_step(coding, MANIFEST, careless, code_step(coding, MANIFEST, "backbone", step, {})[0])
        assert digests(server) == digests(site)
    near, far = (np.linalg.norm(found["backbone"] - exact) for found in (server, careless))
    assert near < 0.6 * far


@pytest.mark.parametrize("coding", CODINGS)
def test_numbers_that_nobody_trained_keep_their_bytes_and_what_they_are_owed(coding):
    step, owed = drawn(2, 300), drawn(3, 300, 1e-3)
    step[:256] = -0.0
    groups = {"backbone": drawn(4, 300)}
    groups["backbone"][:2] = -0.0
    arrays, lost = code_step(coding, MANIFEST, "backbone", step, {"backbone": owed})
    moved = take_step(coding, MANIFEST, groups, arrays)["backbone"]
    assert moved[:256].tobytes() == groups["backbone"][:256].tobytes()
    assert lost["backbone"][:256].tobytes() == owed[:256].tobytes()
    arrived = decode(coding, MANIFEST, arrays)["backbone"][256:]
    np.testing.assert_allclose(arrived + lost["backbone"][256:], (step + owed)[256:], rtol=1e-6)
    assert np.array_equal(moved[256:], groups["backbone"][256:] + arrived)


def test_digests_tell_one_bit():
    groups = {"backbone": drawn(5, 300), "head": np.zeros(4, np.float32)}
    other = {"backbone": groups["backbone"].copy(), "head": -groups["head"]}
    assert digests(groups)["backbone"] == digests(other)["backbone"]
    assert digests(groups)["head"] != digests(other)["head"]
    other["backbone"].view(np.uint32)[7] ^= 1
    assert digests(groups)["backbone"] != digests(other)["backbone"]


@pytest.mark.parametrize(
    ("step", "why"),
    [
        ({"teacher": np.zeros(3, np.int8)}, "step of group 'teacher'"),
        ({"head": np.zeros(4, np.int8)}, "head/scale is nothing"),
        ({"head": np.zeros(3, np.int8), "head/scale": np.zeros(1, np.float32)}, r"int8 \[3\], expected int8 \[4\]"),
    ],
)
def test_what_is_no_step_is_refused(step, why):
    with pytest.raises(ProtocolError, match=why):
        take_step("int8", MANIFEST, {"head": np.zeros(4, np.float32)}, step)
