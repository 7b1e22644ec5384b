"""The way of images into training steps: samples per second, bytes of the cache, memory, and the first reading.

    warm     subjects per CPU second of `loader`, which gathers and converts images of a cache and computes their patch
             features for each batch, and of the `step` of a tiny model that they feed; `loader_over_step`
    bytes    bytes of the cache per voxel, by the type of the scans; `bytes_over_source`, over the type's own
    memory   what a worker's process fills at most, without the pages of files, in three rounds of steps over one and
             over ten times the subjects; `memory_grown`
    cold     CPU seconds for a scan of 192 x 192 x 96 voxels to be read from `.nii.gz` and prepared as 96 x 96 x 96, and
             of nibabel to decode it, both by two threads; `decoding_over_first_epoch`

Every site is made for the bench, of noise around a body.
"""

import multiprocessing
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import nibabel
import numpy as np
import torch
import typer
from numpy.typing import NDArray
from rich.console import Console

from panfm.config import RunConfig, parse_run
from panfm.data.cache import open_store
from panfm.seeds import numpy_generator
from panfm.training.feature_store import FeatureStore
from panfm.training.gradient import BatchGradient
from panfm.training.trainer import Trainer
from simulations.harness import bench
from simulations.study_result import StudyResult

_THREADS = 2
_STREAM = "brain-mr"
_TYPES = {"uint8": 1, "int16": 2, "float32": 4}
_SAMPLE_S = 0.002
_RUN = """
name = "input"
[streams]
brain-mr = { spacing-mm = [2.0, 2.0, 2.0], shape = [EDGE, EDGE, EDGE], patch = [8, 8, 8] }
[model]
size = "SIZE"
tokenizer = "statistics"
[train]
batch-size = 8
local-steps = 4
"""


@bench
def main(
    turns: Annotated[int, typer.Option(min=1, help="Turns of the warm and the cold arms, after one to warm up.")] = 5,
    subjects: Annotated[int, typer.Option(min=8, help="Of the smaller of the two sites whose memory is told.")] = 1000,
    scans: Annotated[int, typer.Option(min=2, help="Read in a turn of the cold arms.")] = 6,
    edge: Annotated[int, typer.Option(min=16, help="Voxels of an image per axis in the warm arms.")] = 96,
) -> StudyResult:
    """Samples a second, bytes, memory: how images come into training steps."""
    torch.set_num_threads(1)
    console = Console(soft_wrap=True, highlight=False)
    result = StudyResult("input", {"turns": turns, "subjects": subjects, "scans": scans, "edge": edge})
    with tempfile.TemporaryDirectory() as temporary:
        scratch = Path(temporary)
        add_bytes(result, scratch / "bytes")
        add_warm(result, scratch / "warm", edge, turns)
        add_memory(result, scratch / "memory", subjects)
        add_cold(result, scratch / "cold", scans, turns)
    for name, value in result.ratios.items():
        console.print(f"{name}: {value:.3f}")
    return result


def description(edge: int, size: str) -> RunConfig:
    """One stream of cubes, and a model that reads block statistics."""
    return parse_run(_RUN.replace("EDGE", str(edge)).replace("SIZE", size))


def write_site(folder: Path, count: int, shape: tuple[int, int, int], voxel_mm: tuple[float, ...], kind: str) -> None:
    """A site of scans: noise within a body, zeros around it."""
    folder.mkdir(parents=True)
    (folder / "site.toml").write_text(f'name = "bench"\n[limits]\nreading-threads = {_THREADS}\n')
    random, rows = numpy_generator(0, "input", kind), ["subject,stream,path"]
    axes = np.meshgrid(*(np.linspace(-1, 1, size) for size in shape), indexing="ij", sparse=True)
    body = sum(np.square(axis) for axis in axes) < 1
    for number in range(count):
        scan = body * random.normal(120, 20, size=shape).clip(1, 255)
        image: Any = nibabel.Nifti1Image(scan.astype(kind), np.diag([*voxel_mm, 1.0]))  # type: ignore[no-untyped-call]
        nibabel.save(image, folder / f"{number}.nii.gz")
        rows.append(f"s{number},{_STREAM},{number}.nii.gz")
    (folder / "manifest.csv").write_text("\n".join(rows) + "\n")


def add_bytes(result: StudyResult, folder: Path) -> None:
    """Sizes of small caches, by the type of the scans."""
    run, shape = description(32, "nano"), (32, 32, 32)
    for kind in _TYPES:
        write_site(folder / kind, 3, shape, (2.0, 2.0, 2.0), kind)
        open_store(folder / kind, run.streams)
        [file] = (folder / kind / ".panfm" / "cache").glob("*.npy")
        result.add(kind, {"bytes_per_voxel": file.stat().st_size / (3 * np.prod(shape))})
    own = {kind: result.mean("bytes_per_voxel", kind) / size for kind, size in _TYPES.items()}
    result.ratios["bytes_over_source"] = max(own.values())


def add_warm(result: StudyResult, folder: Path, edge: int, turns: int) -> None:
    """Subjects per CPU second of loader and step, which take turns."""
    write_site(folder, 32, (edge, edge, edge), (2.0, 2.0, 2.0), "int16")
    run = description(edge, "tiny")
    store, trainer = open_store(folder, run.streams), Trainer(run)
    computed = FeatureStore(
        store.subjects, store.splits, store.images, store.rows, model=trainer.model, device=trainer.device
    )
    everyone, steps, size = np.arange(len(store.subjects)), run.train.local_steps, run.train.batch_size
    for turn in range(turns + 1):
        begin = time.process_time()
        source = BatchGradient(
            trainer, trainer.experts, computed, everyone, site="a", round_number=turn, num_steps=steps, workers=_THREADS
        )
        for _ in range(steps):
            next(source.draw())
        loaded = time.process_time()
        trainer.patch_features(store)
        between = time.process_time()
        trainer.train(store, everyone, first_step=0, num_steps=1, site="a", round_number=turn)
        if turn:
            result.add("loader", {"subjects_per_s": steps * size / (loaded - begin)})
            result.add("step", {"subjects_per_s": size / (time.process_time() - between)})
    result.ratios["loader_over_step"] = result.median_ratio("subjects_per_s", "loader", "step")


def add_memory(result: StudyResult, folder: Path, subjects: int) -> None:
    """Peak memory of a fresh process that trains on a site, and on one with ten times the subjects."""
    run = description(16, "nano")
    for count in (subjects, 10 * subjects):
        write_site(folder / str(count), count, (16, 16, 16), (2.0, 2.0, 2.0), "int16")
        open_store(folder / str(count), run.streams)
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            result.add(str(count), {"peak_mib": pool.submit(peak_mib, folder / str(count)).result()})
    grown = (result.mean("peak_mib", str(count)) for count in (10 * subjects, subjects))
    result.ratios["memory_grown"] = next(grown) / next(grown)


def peak_mib(folder: Path) -> float:
    """Measure the most memory, in MiB, that this process fills while it opens a site and trains three rounds on it."""
    torch.set_num_threads(1)
    run, samples, is_over = description(16, "nano"), [anonymous_mib()], threading.Event()

    def watch() -> None:
        while not is_over.wait(_SAMPLE_S):
            samples.append(anonymous_mib())

    watcher = threading.Thread(target=watch)
    watcher.start()
    store, trainer = open_store(folder, run.streams), Trainer(run)
    everyone: dict[str, Any] = {"indices": store.indices("train"), "num_steps": 20, "site": "a", "workers": _THREADS}
    for number in range(1, 4):
        trainer.train(store, first_step=0, round_number=number, **everyone)
    is_over.set()
    watcher.join()
    return max(samples)


def anonymous_mib() -> float:
    """Memory of this process that is no page of a file."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon"))


def add_cold(result: StudyResult, folder: Path, scans: int, turns: int) -> None:
    """CPU seconds per scan of the first reading and of bare decoding, which take turns."""
    write_site(folder, scans, (192, 192, 96), (1.0, 1.0, 2.0), "int16")
    run, files = description(96, "nano"), sorted(folder.glob("*.nii.gz"))
    for turn in range(turns + 1):
        for file in (folder / ".panfm" / "cache").glob("*.npy"):
            file.unlink()
        begin = time.process_time()
        open_store(folder, run.streams)
        read = time.process_time()
        with ThreadPoolExecutor(_THREADS) as pool:
            list(pool.map(decode, files))
        decoded = time.process_time()
        if turn:
            result.add("first-epoch", {"cpu_s_per_scan": (read - begin) / scans})
            result.add("decoding", {"cpu_s_per_scan": (decoded - read) / scans})
    result.ratios["decoding_over_first_epoch"] = result.median_ratio("cpu_s_per_scan", "decoding", "first-epoch")


def decode(file: Path) -> NDArray[np.int16]:
    """Decode a scan with nibabel alone, int16 [X, Y, Z]: the reference for this project's reading."""
    image: Any = nibabel.load(file)
    return np.asarray(image.dataobj)
