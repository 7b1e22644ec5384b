"""kill -9 the server and every site, again and again; the final weights are those of the undisturbed run, bit for bit.

The round needs all four sites, so a site that dies ends the run; like a server that dies, it is resumed.
"""

import json
import random
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = Path(__file__).with_name("chaos_run.py")
SITES = ("alpha", "beta", "delta", "gamma")
KILLS = 20
ROUNDS = 3
OVERRIDES = (f"train.rounds={ROUNDS}", "federation.min-sites=4", "sharing.optimiser.kind=momentum")
CODINGS = (("sharing.coding=int8",), ())
"""With int8 the server sends steps, and both ends remember what they lost; runs take turns."""


@pytest.fixture
def four_sites(federation, write_site):
    write_site(federation.sites / "delta", "delta", ("heart", "liver"))
    return federation


@pytest.fixture
def forker() -> Iterator[subprocess.Popen]:
    """The script, waiting for jobs."""
    words = [sys.executable, str(SCRIPT)]
    with subprocess.Popen(words, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield process
        process.stdin.close()


def attempt(forker: subprocess.Popen, federation, name: str, kill: dict) -> int:
    """Start or resume a run; returns the exit code of the server's process."""
    job = {"sites": str(federation.sites), "run_dir": str(federation.folder / name), **kill}
    forker.stdin.write(json.dumps(job) + "\n")
    forker.stdin.flush()
    while not (answer := forker.stdout.readline().strip()).lstrip("-").isdigit():
        assert forker.poll() is None
    return int(answer)


def draw_kill(rng: random.Random, turn: int, rounds_done: int) -> dict:
    """Who dies, and when: at one of the files it touches, or somewhere in time."""
    victim = ("server", *SITES)[turn % 5]
    when = {"events": rng.randint(1, 25 if victim == "server" else 6)}
    if rng.random() < 0.3:
        when = {"seconds": rng.uniform(0.0, 1.0 if victim == "server" else 0.1)}
    return {"victim": victim, "round": rng.randint(min(rounds_done + 1, ROUNDS), ROUNDS), **when}


def rounds_done(run_dir: Path) -> int:
    return max((int(path.stem.removeprefix("round-")) for path in (run_dir / "checkpoint").glob("round-*")), default=0)


def model_bytes(run_dir: Path) -> bytes:
    return (run_dir / "model" / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_killed_anywhere_and_resumed_ends_at_the_same_bits(four_sites, forker):
    undisturbed = [
        model_bytes(four_sites.run(f"undisturbed-{turn}", *OVERRIDES, *coding)) for turn, coding in enumerate(CODINGS)
    ]
    rng, killed, finished = random.Random(0), Counter(), 0
    while sum(killed.values()) < KILLS or finished < len(CODINGS):
        name = f"run-{finished}"
        run_dir = four_sites.folder / name
        if not run_dir.exists():
            four_sites.job(name, *OVERRIDES, *CODINGS[finished % 2])
        enough = sum(killed.values()) >= min(KILLS // len(CODINGS) * (finished + 1), KILLS)
        kill = {"victim": "", "round": 0} if enough else draw_kill(rng, sum(killed.values()), rounds_done(run_dir))
        code = attempt(forker, four_sites, name, kill)
        if code == 0:
            assert model_bytes(run_dir) == undisturbed[finished % 2]
            numbers = [json.loads(line)["round"] for line in (run_dir / "rounds.jsonl").read_text().splitlines()]
            assert numbers == list(range(1, ROUNDS + 1))
            finished += 1
        else:
            assert code == (-signal.SIGKILL if kill["victim"] == "server" else 3), kill
            killed[kill["victim"]] += 1
    assert sum(killed.values()) >= 20
    assert all(killed[victim] >= 3 for victim in ("server", *SITES)), killed


@pytest.mark.slow
@pytest.mark.long
def test_killed_on_ray_too(four_sites):
    undisturbed = model_bytes(four_sites.run("undisturbed", *OVERRIDES))
    run_dir = four_sites.job("ray", *OVERRIDES).run_dir
    kills = [
        {"victim": "beta", "round": 1, "events": 2},
        {"victim": "server", "round": 0, "events": 14},
        {"victim": "gamma", "round": 2, "events": 1},
    ]
    for kill in (*kills, {"victim": "", "round": 0}):
        job = {"sites": str(four_sites.sites), "run_dir": str(run_dir), **kill}
        words = [sys.executable, str(SCRIPT), "ray", json.dumps(job)]
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
        assert (done.returncode == 0) == (kill["victim"] == ""), (kill, done.stderr[-2000:])
        if kill["victim"]:
            assert not (run_dir / "model").exists(), kill
    assert model_bytes(run_dir) == undisturbed
