"""One side of a comparison: a version of the code, installed apart, and the processes that do its runs.

<folder>/venv           an interpreter of its own that sees this one's packages, with `panfm` as this version has it
<folder>/cohorts, quick what it made of the cohort's description; the sites of it alone, for runs without a probe
<folder>/runs, replies  run folders, and what left the sites
<folder>/logs           what the runs printed
"""

import hashlib
import json
import os
import site
import subprocess
import sys
import sysconfig
import tempfile
import venv
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from panfm.errors import ConfigError, RunError, one_line
from simulations.same_bits.comparison import RunFiles
from simulations.same_bits.hooks.sitecustomize import REPLIES, STOPPED
from simulations.same_bits.runs import DESCRIPTION, FIRST, STOP_ROUND, Run

ROOT = Path(__file__).resolve().parents[2]
_HOOKS = Path(__file__).parent / "hooks"
_NOT_CONTENT = "site.toml"
"""What a version writes into it is its own affair; all else in a cohort must be the same bytes."""
_OLDER_NAMES = {"patient-dp": "privacy", "site-dp": "server-privacy"}
"""Tables of a run as they are called in trees without panfm/config/patient_dp.py."""
_Tell = Callable[[str], None]


@dataclass(frozen=True)
class Side:
    """A version of the code and the folder in which its runs lie."""

    name: str
    tree: Path
    folder: Path

    def set_up(self) -> None:
        """Install this version, and write the description. Raises RunError if it cannot be installed."""
        for name in ("logs", "replies", "runs"):
            (self.folder / name).mkdir(parents=True)
        venv.create(self.folder / "venv", symlinks=True)
        packages = "".join(f"import site; site.addsitedir({path!r})\n" for path in site.getsitepackages())
        (self._packages / "of-this-interpreter.pth").write_text(packages, encoding="utf-8")
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(self._python), "install"]
        done = subprocess.run(
            [*pip, "--quiet", "--no-deps", "--no-index", "--no-build-isolation", str(self.tree)],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise RunError(f"{self.name}: {self.tree} cannot be installed: {one_line(done.stderr[-300:])}")
        (self.folder / "run.toml").write_text(DESCRIPTION, encoding="utf-8")

    def make_cohort(self, tell: _Tell) -> str:
        """Do the first run, which makes the cohort; returns a digest of the cohort's files. Raises RunError."""
        self._do([self._job(FIRST)], tell)
        cohorts = list((self.folder / "cohorts").iterdir())
        if len(cohorts) != 1:
            raise RunError(f"{self.name}: {len(cohorts)} cohorts under {self.folder / 'cohorts'}, expected one")
        (self.folder / "quick").mkdir()
        (self.folder / "quick" / "sites").symlink_to(cohorts[0] / "sites")
        return digest(cohorts[0])

    def do(self, runs: Sequence[Run], tell: _Tell) -> None:
        """Do all other runs. Raises RunError, naming the run and its log, if one does not end as it should."""
        self._do([self._job(run) for run in runs if run.engine == "local" and not run.resumes_like], tell)
        for run in runs:
            if run.resumes_like:
                self._do([self._job(run, stop=STOP_ROUND)], tell, status=STOPPED)
                self._do([self._job(run, resume=True)], tell)
            elif run.engine != "local":
                self._do([self._job(run)], tell)

    def files(self, run: Run) -> RunFiles:
        """Folders of a run's files."""
        run_dir = self._run_dir(run)
        at_sites = run_dir / "sites" if run.engine == "local" else (self.folder / "quick" / "sites").resolve()
        return RunFiles(run_dir, self.folder / "replies" / run.name, (run_dir / "checkpoint", at_sites))

    @cached_property
    def _python(self) -> Path:
        return self.folder / "venv" / "bin" / "python"

    @cached_property
    def _packages(self) -> Path:
        base = str(self.folder / "venv")
        return Path(sysconfig.get_path("purelib", "venv", {"base": base, "platbase": base}))

    def _run_dir(self, run: Run) -> Path:
        return self.folder / "runs" / run.name

    def _job(self, run: Run, *, resume: bool = False, stop: int | None = None) -> dict[str, Any]:
        cohort = () if run.makes_cohort else ('cohort={ kind = "folder", path = "quick" }',)
        words = [word for override in (*cohort, *map(self._key_of_tree, run.overrides)) for word in ("--set", override)]
        words = ["--resume", f"runs/{run.name}"] if resume else [*words, "--out", f"runs/{run.name}"]
        return {
            "run": run.name,
            "words": ["run", "run.toml", *words, "--engine", run.engine],
            "replies": str(self.folder / "replies" / run.name),
            "seeded": run.is_seeded,
            "stop": stop,
            "log": str(self._log(run.name)),
        }

    def _key_of_tree(self, override: str) -> str:
        """An override with the name that its table has in this side's tree."""
        table, _, rest = override.partition(".")
        is_older = not (self.tree / "panfm" / "config" / "patient_dp.py").exists()
        return f"{_OLDER_NAMES[table]}.{rest}" if is_older and table in _OLDER_NAMES else override

    def _log(self, name: str) -> Path:
        return self.folder / "logs" / f"{name}.log"

    def _do(self, jobs: list[dict[str, Any]], tell: _Tell, *, status: int = 0) -> None:
        """Jobs in a process of their own, which must end with a status."""
        if not jobs:
            return
        packages = {"panfm": str(self._packages), "simulations": str(self.tree), "server": str(self.tree)}
        batch = self.folder / "jobs.json"
        batch.write_text(json.dumps({"packages": packages, "jobs": jobs}), encoding="utf-8")
        log = self._log("process")
        words = [str(self._python), str(_HOOKS / "batch.py"), str(batch)]
        with (
            log.open("ab") as errors,
            subprocess.Popen(
                words, cwd=self.folder, env=self._environment(), stdout=subprocess.PIPE, stderr=errors, text=True
            ) as process,
        ):
            assert process.stdout
            ended = []
            for line in process.stdout:
                ended.append(json.loads(line))
                tell(f"{self.name}: {ended[-1]['run']} ({ended[-1]['seconds']:.0f} s)")
        if failed := [job["run"] for job in ended if job["status"]]:
            raise RunError("\n".join(f"{self.name}: {run}: {_last_line(self._log(run))}" for run in failed))
        if process.returncode != status:
            why = f"status {process.returncode}, expected {status}: {_last_line(log)}"
            raise RunError(f"{self.name}: {jobs[0]['run']}: {why}")

    def _environment(self) -> dict[str, str]:
        paths = [str(_HOOKS), str(self._packages), str(self.tree)]
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        fixed = {"PYTHONPATH": os.pathsep.join(paths), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
        return os.environ | fixed | {"PATH": path, REPLIES: str(self.folder / "replies" / "other")}


def digest(cohort: Path) -> str:
    """SHA-256 over names and bytes of a cohort's files, but for `site.toml` and what runs have added."""
    total = hashlib.sha256()
    for path in sorted(cohort.rglob("*")):
        name = path.relative_to(cohort)
        if path.is_file() and name.name != _NOT_CONTENT and not any(part.startswith(".") for part in name.parts):
            total.update(f"{name.as_posix()} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return total.hexdigest()


@contextmanager
def checked_out(base: str) -> Iterator[Path]:
    """A worktree of a commit, until the block ends. Raises ConfigError if there is no such commit."""
    with tempfile.TemporaryDirectory(prefix="panfm-same-bits-base-") as folder:
        tree = Path(folder, "tree")
        _git("worktree", "add", "--detach", str(tree), f"{base}^{{commit}}")
        try:
            yield tree
        finally:
            _git("worktree", "remove", "--force", str(tree))


def _git(*words: str) -> None:
    done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise ConfigError(f"git {words[0]}: {one_line(done.stderr)}, expected BASE to be a commit of this repository")


def _last_line(path: Path) -> str:
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n") if path.exists() else []
    last = next((line for line in reversed(lines) if line.strip()), "printed nothing")
    return f"{one_line(last)} (log: {path})"
