"""The job in this project, by one of its engines: handshakes, rounds and checkpoints as in any run."""

import sys
import tempfile
from pathlib import Path

from panfm.evaluate.embed import load_model
from server.run_folder import RunFolder
from simulations.bench.peer_jobs.peer_training import job_at
from simulations.engines.job import Job, run_job


def main(path: str, engine: str) -> None:
    """Run all rounds."""
    job = job_at(path)
    with tempfile.TemporaryDirectory(dir=job.model_file.parent) as folder:
        run_dir = Path(folder, "run")
        RunFolder.create(run_dir, job.run)
        run_job(Job(job.folders[0].parent, run_dir), engine)
        job.keep(load_model(run_dir / "model")[0].state_dict())


if __name__ == "__main__":
    main(*sys.argv[1:])
