"""A script: goes a site's way with what the base of panfm installs, and prints what the worker imported, as JSON.

    python base_install.py FOLDER [--refuse]            init, check, dry run, and a round asked of the worker
    python base_install.py FOLDER [--refuse] --worker   the worker

With --refuse, imports of libraries that the base does not ask for fail as if they were not installed.
"""

import json
import os
import signal
import subprocess
import sys
import time
import tomllib
from importlib.machinery import ModuleSpec, PathFinder
from importlib.metadata import distribution, packages_distributions
from pathlib import Path
from typing import Any, ClassVar

import nibabel
import numpy as np
from packaging.requirements import Requirement

RUN = """
name = "base"
[streams]
brain-mr = { spacing-mm = [8.0, 8.0, 8.0], shape = [8, 8, 8], patch = [4, 4, 4] }
heart-mr = { spacing-mm = [8.0, 8.0, 8.0], shape = [8, 8, 8], patch = [4, 4, 4] }
[train]
rounds = 2
local-steps = 2
batch-size = 2
"""
NO_FLOORS = "\n[limits]\nsmallest-batch = 1\nsmallest-steps = 1\n"


def base_distributions() -> set[str]:
    """What this checkout declares as the base of panfm, and all that it asks for in turn."""
    pyproject = Path(__file__).parents[2] / "pyproject.toml"
    left = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]["dependencies"]
    known: set[str] = set()
    while left:
        requirement = Requirement(left.pop())
        name = requirement.name.lower().replace("_", "-")
        if name not in known and (requirement.marker is None or requirement.marker.evaluate({"extra": ""})):
            known.add(name)
            left.extend(distribution(name).requires or ())
    return known


class BaseFinder(PathFinder):
    """Finds no module of a distribution that the base does not ask for."""

    refused: ClassVar[set[str]] = set()

    @classmethod
    def find_spec(cls, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return None if fullname.partition(".")[0] in cls.refused else super().find_spec(fullname, path, target)


def refuse_all_but_the_base() -> None:
    base = base_distributions()
    BaseFinder.refused = {
        module
        for module, names in packages_distributions().items()
        if not base & {name.lower().replace("_", "-") for name in names}
    } - {"panfm"}
    sys.meta_path = [BaseFinder if finder is PathFinder else finder for finder in sys.meta_path]


def imported() -> dict[str, object]:
    """Lines of panfm that this process imported, by module, and the other libraries."""
    files = {name: module.__file__ for name, module in sys.modules.items() if name.partition(".")[0] == "panfm"}
    lines = {name: len(Path(file).read_text(encoding="utf-8").splitlines()) for name, file in files.items() if file}
    others = {name.partition(".")[0] for name in sys.modules} - set(sys.stdlib_module_names)
    return {"lines": lines, "libraries": sorted(others)}


def panfm(*words: object) -> None:
    from panfm.cli import main

    main([str(word) for word in words], standalone_mode=False)


def serve(folder: Path) -> None:
    """Run the worker; tell what it imported when it is ended."""

    def end(*_: object) -> None:
        print(json.dumps(imported()), flush=True)
        os._exit(0)

    signal.signal(signal.SIGTERM, end)
    panfm("site", "start", folder)


def write_images(folder: Path) -> None:
    rows, random = ["subject,stream,path,split"], np.random.default_rng(0)
    for subject in range(6):
        for stream in ("brain-mr", "heart-mr"):
            volume = random.uniform(0, 1000, size=(8, 8, 8)).astype(np.int16)
            nibabel.save(
                nibabel.Nifti1Image(volume, np.diag([8.0, 8.0, 8.0, 1.0])), folder / f"{subject}-{stream}.nii.gz"
            )
            rows.append(f"s{subject},{stream},{subject}-{stream}.nii.gz,{'val' if subject == 5 else 'train'}")
    (folder / "manifest.csv").write_text("\n".join(rows) + "\n")


def ask_worker(folder: Path) -> None:
    """A handshake, and a round."""
    import socket

    from panfm.config import parse_run
    from panfm.sharing.frames import Frame, Kind, address, encode, receive, send
    from panfm.sharing.messages import Handshake, Invitation, RoundReply
    from panfm.site.dry_run import _first_task

    def ask(question: Frame) -> Frame:
        with socket.socket(socket.AF_UNIX) as connection, address(folder / ".panfm/run/worker.sock") as path:
            connection.connect(path)
            send(connection, encode(question), timeout_s=None)
            answer = receive(connection, timeout_s=None)
            assert answer.kind is Kind.ANSWER, answer
            return answer

    handshake = Handshake.from_records(ask(Frame(Kind.HANDSHAKE, Invitation(RUN).to_records())).records)
    task = _first_task(parse_run(RUN), handshake)
    reply = RoundReply.from_records(ask(Frame(Kind.ROUND, task.to_records())).records)
    assert reply.updates


def go(folder: Path, words: list[str]) -> None:
    panfm("site", "init", folder, "--name", "base")
    site_toml = folder / "site.toml"
    site_toml.write_text('name = "base"\n' + NO_FLOORS)
    write_images(folder)
    from panfm.config import experiment_hash, parse_run

    (folder / "run.toml").write_text(RUN)
    panfm("site", "check", folder, "--run", folder / "run.toml")
    panfm("site", "dry-run", folder, "--run", folder / "run.toml")
    panfm("site", "approve", folder, experiment_hash(parse_run(RUN)))
    panfm("site", "requests", folder)
    worker = subprocess.Popen([sys.executable, __file__, *words, "--worker"], stdout=subprocess.PIPE, text=True)
    try:
        assert worker.stdout
        while "flower-supernode" not in worker.stdout.readline():
            assert worker.poll() is None
        time.sleep(0.1)
        ask_worker(folder)
    finally:
        worker.terminate()
    print(worker.communicate(timeout=60)[0].splitlines()[-1])


if __name__ == "__main__":
    if "--refuse" in sys.argv:
        refuse_all_but_the_base()
    folder = Path(sys.argv[1])
    if "--worker" in sys.argv:
        serve(folder)
    else:
        go(folder, sys.argv[1:])
