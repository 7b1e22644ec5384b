"""Do several runs in one process, one after the other: `python batch.py JOBS`, a JSON file.

Every job is `python -m simulations` with other words. What it prints goes to a file; a line with its name and status is
printed when it ends.
"""

import contextlib
import importlib
import json
import os
import runpy
import sys
import time
import traceback
from pathlib import Path
from typing import Any

Job = dict[str, Any]
_HOOKS: Any = sys.modules["sitecustomize"]


def run(job: Job) -> int:
    """Exit status of one job; 1 for an error of any kind."""
    os.environ[_HOOKS.REPLIES] = job["replies"]
    os.environ[_HOOKS.SEEDED] = "1" if job["seeded"] else ""
    os.environ[_HOOKS.STOP] = str(job["stop"] or "")
    _HOOKS.begin_run()
    sys.argv = ["simulations", *job["words"]]
    try:
        runpy.run_module("simulations", run_name="__main__", alter_sys=True)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except Exception:
        traceback.print_exc()
        status = 1
    else:
        status = 0
    if job["seeded"] and status == 0 and not _HOOKS.num_seeded_bytes:
        sys.stderr.write("no noise was seeded: os.urandom is not where the run's noise comes from\n")
        return 1
    return status


def check_import(package: str, folder: str) -> None:
    """End the process unless a package comes from a folder."""
    path = Path(str(importlib.import_module(package).__file__)).resolve()
    if not path.is_relative_to(Path(folder).resolve()):
        sys.exit(f"{package}: imported from {path}, expected it under {folder}")


def main(path: Path) -> None:
    """Do all jobs of a file, also after one that fails."""
    batch = json.loads(path.read_text(encoding="utf-8"))
    for package, folder in batch["packages"].items():
        check_import(package, folder)
    for job in batch["jobs"]:
        begin = time.monotonic()
        with (
            Path(job["log"]).open("a", encoding="utf-8", buffering=1) as log,
            contextlib.redirect_stdout(log),
            contextlib.redirect_stderr(log),
        ):
            status = run(job)
        told = {"run": job["run"], "status": status, "seconds": time.monotonic() - begin}
        sys.stdout.write(json.dumps(told) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
