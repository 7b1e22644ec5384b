"""The bench of the input: every part runs, and what must hold at any size holds."""

import json

import pytest
from typer.testing import CliRunner

from simulations.__main__ import app


@pytest.mark.slow
def test_the_bench_tells_bytes_memory_and_speed(tmp_path):
    small = ["--turns", "1", "--subjects", "40", "--scans", "2", "--edge", "32"]
    done = CliRunner().invoke(app, ["bench", "input", *small, "--json", str(tmp_path / "input.json")])
    assert done.exit_code == 0, done.output
    told = json.loads((tmp_path / "input.json").read_text())
    ratios = told["ratios"]
    assert set(ratios) == {"bytes_over_source", "loader_over_step", "memory_grown", "decoding_over_first_epoch"}
    assert 1.0 <= ratios["bytes_over_source"] < 1.01
    assert 0.8 < ratios["memory_grown"] < 1.2
    assert ratios["loader_over_step"] > 1
