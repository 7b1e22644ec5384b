"""`bench gpu`, all of it but the GPU: small arms on the processor, counted operations, missing organs."""

import math

import pytest
import torch
from rich.console import Console

from simulations.bench import gpu
from simulations.study_result import StudyResult


@pytest.fixture
def result():
    return StudyResult("gpu", {}, unit="samples/s")


def test_without_a_gpu_it_is_skipped_with_one_line(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    gpu.main(json=tmp_path / "gpu.json")
    assert capsys.readouterr().out == "bench gpu: skipped, PyTorch shows no GPU\n"
    assert (tmp_path / "gpu.json").exists()


def test_operations_of_a_product_by_hand():
    assert gpu.operations_of(lambda: torch.ones(2, 3) @ torch.ones(3, 5)) == 2 * 2 * 3 * 5


def test_operations_of_grouped_products():
    rows, weights = torch.ones(6, 8, dtype=torch.bfloat16), torch.ones(2, 8, 16, dtype=torch.bfloat16)
    ends = torch.tensor([2, 6], dtype=torch.int32)
    counted = gpu.operations_of(lambda: torch.nn.functional.grouped_mm(rows, weights, offs=ends))
    assert counted == 2 * 6 * 8 * 16


def test_shapes_have_the_tokens_that_the_page_says():
    for shape, tokens in (("picture", 196), ("volumes", 1000)):
        run = gpu.description(shape, "nano", 1, 8)
        assert sum(math.prod(stream.grid) for stream in run.streams.values()) == tokens


def test_everyone_holds_an_organ_and_organs_are_missing():
    run = gpu.description("volumes", "nano", 1, 8)
    store = gpu.incomplete_store(run)
    held = [len(rows) for rows in store.rows.values()]
    assert {subject for rows in store.rows.values() for subject in rows} == set(range(8))
    assert 0 < sum(held) < 8 * len(run.streams)


def test_no_arm_begins_after_the_end(result, capsys):
    gpu.measure(result, Console(soft_wrap=True), ("nano",), 1, 8, end=-math.inf)
    assert not result.values
    assert "picture/nano/ours: left out" in capsys.readouterr().out


def test_an_arm_that_fails_is_told_and_left_out(result, capsys, monkeypatch):
    def fail():
        raise torch.OutOfMemoryError("of it")

    monkeypatch.setattr(gpu, "arms", lambda *_: iter([("a/b/ours", 8, fail), ("a/b/plain", 8, lambda: (2.0, 0.0))]))
    gpu.measure(result, Console(soft_wrap=True), ("nano",), 1, 8, end=math.inf)
    assert "a/b/ours: failed, OutOfMemoryError" in capsys.readouterr().out
    assert result.values == {("step", "a/b/plain"): [2.0]}


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # torch's compiler looks at all
def test_every_arm_runs_on_the_processor(result, monkeypatch):
    monkeypatch.setattr(gpu, "COMPILER", "eager")
    gpu.measure(result, Console(), ("nano",), 1, 8, end=math.inf)
    names = {name for _, name in result.values}
    arms = {"ours", "compiled", "plain", "plain-compiled", "experts", "workers"}
    assert names == {f"{shape}/nano/{arm}" for shape in gpu.SHAPES for arm in arms} | {"picture/nano/two-sites"}
    assert all(rate > 0 for (rate,) in result.values.values())
    assert "over_plain_compiled/volumes/nano/ours" in result.ratios
    assert result.ratios["share_of_matrix_rate/picture/nano/experts"] > 0
