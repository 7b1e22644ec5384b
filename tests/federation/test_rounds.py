"""Whole runs over three small hospitals, in process."""

import json
from pathlib import Path


def lines(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "rounds.jsonl").read_text().splitlines()]


def model_bytes(run_dir: Path) -> bytes:
    return (run_dir / "model" / "model.safetensors").read_bytes()


def test_a_run_leaves_its_folder(federation):
    run_dir = federation.run("first")
    assert [line["round"] for line in lines(run_dir)] == [1, 2, 3]
    print(json.dumps(lines(run_dir)[-1], indent=1))
