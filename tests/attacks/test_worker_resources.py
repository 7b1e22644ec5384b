"""Attacks on what a site has: memory, time, disk. Each is refused with one line before anything is allocated for it."""

import gzip
import json
import os
import re
import resource
import socket
import struct
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import tomli_w
import torch

from panfm.config import dump_toml, parse_run, parse_site
from panfm.data import cache_build
from panfm.data.cache import open_store
from panfm.data.cache_file import CachedStream
from panfm.data.packed import TYPES, Packed
from panfm.data.readers import ImageError, picture
from panfm.data.readers.nifti import NiftiReader, decode_volume
from panfm.data.readers.picture import decode_picture
from panfm.data.store import ImageStore
from panfm.errors import DataError, LimitError, ProtocolError
from panfm.models.sizes import sizes_of
from panfm.sharing import frames
from panfm.sharing.frames import Frame, Kind, receive
from panfm.sharing.messages import Invitation, Records
from panfm.site import Site, answer, session
from panfm.site.admission import check_sizes
from panfm.site.handler import time_limit
from panfm.site.worker import Worker
from panfm.training import feature_store
from panfm.training.trainer import Trainer
from tests.conftest import NO_FLOORS
from tests.unit.site.test_site import RUN, task

SECONDS, MIB = 2.0, 200


@pytest.fixture
def folder(tmp_path, write_site):
    return write_site(tmp_path / "alpha", "alpha", ("brain", "heart"))


def hostile(extra: str = "", **changes: str) -> str:
    """The run of the tests with other lines, or other tables behind it."""
    text = RUN
    for key, value in changes.items():
        key = key.replace("_", "-")
        lines = [line for line in text.splitlines() if line.startswith(f"{key} = ")]
        text = text.replace(lines[0], f"{key} = {value}")
    return text + extra


def set_limit(folder: Path, key: str, value: float) -> None:
    limits = NO_FLOORS | {key: value}
    (folder / "site.toml").write_text(tomli_w.dumps({"name": "alpha", "limits": limits}))


def stream(shape: str, patch: str) -> str:
    return f"{{ spacing-mm = [8.0, 8.0, 8.0], shape = {shape}, patch = {patch} }}"


POOL = '[model]\nbackbone = "director-experts"\n'
TOO_LARGE = {
    "shape": (hostile(brain_mr=stream("[4096, 4096, 4096]", "[512, 512, 512]")), "voxels-per-image"),
    "image": (hostile(brain_mr=stream("[1024, 1024, 1024]", "[64, 64, 32]")), "voxels-per-image"),
    "picture": (hostile(brain_mr="{ shape = [65536, 65536], patch = [256, 256], channels = 3 }"), "voxels-per-image"),
    "patches": (hostile(brain_mr=stream("[128, 128, 128]", "[1, 1, 1]")), "tokens-per-patient"),
    "experts": (
        hostile('[model]\nsize = "base"\n' + POOL.replace("[model]\n", "") + "experts = { count = 1024 }\n"),
        "parameters",
    ),
    "decoder": (
        hostile(
            '[model]\ntokenizer = "patch"\n[objective]\nname = "mae"\n',
            brain_mr=stream("[1024, 1024, 128]", "[1024, 1024, 64]"),
        ),
        "parameters",
    ),
    "local steps": (hostile(local_steps="1000000"), "local-steps"),
    "rounds": (hostile(rounds="1000000"), "rounds"),
}

OUT_OF_RANGE = {
    "model.hidden-multiple": hostile("[model]\nhidden-multiple = 1000000\n"),
    "model.hidden-multiple of 63 bits": hostile(f"[model]\nhidden-multiple = {2**62}\n"),
    "model.experts.count.0": hostile(POOL + "experts = { count = [1000000, 2] }\n"),
    "objective.prototypes": hostile('[objective]\nname = "dino"\nprototypes = 1000000000\n'),
    "train.local-steps": hostile(local_steps="1000000000"),
    "train.rounds": hostile(rounds="1000000000"),
}


def asked(site: Site, run_toml: str, kind: Kind = Kind.HANDSHAKE) -> str:
    """The reason that a site gives."""
    records = Invitation(run_toml).to_records()
    config = {**records.config, "run-id": "run-1", "round": 1}
    found = answer(site, Frame(kind, Records(config=config)))
    assert found.kind is Kind.ERROR, found
    return str(found.records.config["reason"])


@pytest.mark.parametrize("kind", [Kind.HANDSHAKE, Kind.ROUND])
@pytest.mark.parametrize(("run_toml", "limit"), TOO_LARGE.values(), ids=TOO_LARGE)
def test_server_asks_for_what_no_site_has_and_nothing_is_allocated(folder, monkeypatch, run_toml, limit, kind):
    monkeypatch.setattr("panfm.site.site.open_store", lambda *_: pytest.fail("images were read"))
    site, before = Site(folder), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.process_time()
    reason = asked(site, dump_toml(parse_run(run_toml)), kind)
    assert time.process_time() - start < SECONDS
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024 < MIB
    assert reason.startswith("site alpha: LimitError: this run asks for ")
    assert f", this site's limits.{limit} is " in reason


@pytest.mark.parametrize("kind", [Kind.HANDSHAKE, Kind.ROUND])
@pytest.mark.parametrize(("key", "run_toml"), OUT_OF_RANGE.items(), ids=OUT_OF_RANGE)
def test_server_asks_for_a_size_that_no_description_may_name(folder, monkeypatch, key, run_toml, kind):
    monkeypatch.setattr("panfm.site.site.open_store", lambda *_: pytest.fail("images were read"))
    start = time.process_time()
    assert asked(Site(folder), run_toml, kind).startswith(
        f"site alpha: ProtocolError: run description: {key.split()[0]}: "
    )
    assert time.process_time() - start < SECONDS


@pytest.mark.parametrize("spacing", ["600.0", "1000.0"])
def test_a_spacing_whose_blur_filled_the_memory_is_answered_within_little(folder, spacing):
    """At 10,000 mm, the blur of a scan of 64^3 asked for 86 GB. To refuse would tell of the scan."""
    run_toml = hostile(brain_mr=stream("[8, 8, 8]", "[4, 4, 8]").replace("[8.0,", f"[{spacing},"))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    store = open_store(folder, parse_run(run_toml).streams)
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024 < MIB
    assert np.isfinite(store.images["brain-mr"]).all()


def test_one_step_that_fills_too_much_memory_is_refused_before_images_are_prepared(folder, monkeypatch):
    """21 MiB of images had been written by then."""
    monkeypatch.setattr(session, "_trainers", lambda *_: pytest.fail("a model was built"))
    monkeypatch.setattr("panfm.site.site.open_store", lambda *_: pytest.fail("images were read"))
    fine = hostile('[model]\nsize = "base"\n', brain_mr=stream("[128, 128, 64]", "[4, 4, 4]"))
    set_limit(folder, "step-gib", 0.5)
    assert ", this site's limits.step-gib is 0.5" in asked(Site(folder), dump_toml(parse_run(fine)))
    assert not (folder / ".panfm" / "cache").exists()


def test_a_teacher_that_goes_through_a_thousand_experts_is_counted(folder, monkeypatch):
    """It filled 0.78 GiB by itself, where 0.0026 GiB were counted: next to nothing was left to the student."""
    monkeypatch.setattr(session, "_trainers", lambda *_: pytest.fail("a model was built"))
    pool = '[masking]\npolicy = "random"\nratio = 0.999\n' + POOL + "hidden-multiple = 1\n"
    text = hostile(
        pool + "experts = { count = 1024, active = 1024 }\n", batch_size="16", brain_mr=stream("[8, 8, 8]", "[2, 2, 2]")
    )
    set_limit(folder, "step-gib", 0.75)
    assert ", this site's limits.step-gib is 0.75" in asked(Site(folder), dump_toml(parse_run(text)))


@pytest.mark.slow
def test_images_of_any_size_go_through_the_stem_within_a_fixed_memory(monkeypatch):
    """Sixty-four were taken at a time: 176 GiB of the largest that a site lets pass."""
    image = np.broadcast_to(np.float32(0.5), (64, 1, 192, 192, 192))
    store = ImageStore(("a",) * 64, ("train",) * 64, {"brain-mr": image}, {"brain-mr": np.arange(64)})
    taken: list[int] = []

    def smallest_features(images: torch.Tensor, *_: object) -> torch.Tensor:
        taken.append(images.numel() * 4)
        return images[:, :, :1, :1, :1].clone()

    monkeypatch.setattr(feature_store, "image_features", smallest_features)
    streams = dict(parse_run(RUN.replace("[8, 8, 8]", "[192, 192, 192]")).streams)
    model = SimpleNamespace(stream_names=("brain-mr",), stream_configs=streams, tokenizer="statistics")
    features = feature_store.feature_store(store, model, torch.device("cpu"))
    assert features.images_at("brain-mr", np.arange(64)).shape == (64, 1, 1, 1, 1)
    assert max(taken) <= 256 * 2**20


def test_models_of_this_house_are_within_the_limits():
    """ViT-B over ten volumes of 96^3, also with eight experts of half width."""
    text = 'name = "large"\n[model]\nsize = "base"\nbackbone = "director-experts"\nhidden-multiple = 2\n[streams]\n'
    organs = ("brain", "heart", "liver", "kidney", "pancreas")
    for organ in organs:
        for modality in ("mr", "ct"):
            text += f"{organ}-{modality} = {{ spacing-mm = [2, 2, 2], shape = [96, 96, 96], patch = [16, 16, 16] }}\n"
    run = parse_run(text.replace("[2, 2, 2]", "[2.0, 2.0, 2.0]"))
    limits = parse_site('name = "alpha"').limits
    check_sizes(run, limits)


def test_the_time_limit_holds_for_a_handshake(folder, monkeypatch):
    """53 s went by under a limit of 8 s."""
    set_limit(folder, "seconds-per-round", 0.2)
    monkeypatch.setattr("panfm.site.site.open_store", lambda *_: time.sleep(20.0))
    start = time.monotonic()
    reason = asked(Site(folder), task().run_toml)
    assert time.monotonic() - start < 10.0
    assert reason == "site alpha: LimitError: took longer than this site's limits.seconds-per-round (0.2)"


def test_threads_that_read_images_stop_with_the_question(folder, monkeypatch):
    begun: list[Path] = []

    def slow(path: Path, *_: object) -> tuple[np.ndarray, bytes]:
        begun.append(path)
        time.sleep(0.3)
        return np.zeros((1, 8, 8, 8), np.float32), b""

    monkeypatch.setattr(cache_build, "read_with_digest", slow)
    set_limit(folder, "seconds-per-round", 0.1)
    assert "seconds-per-round" in asked(Site(folder), task().run_toml)
    alive = [thread for thread in threading.enumerate() if thread.name.startswith("ThreadPoolExecutor")]
    for thread in alive:
        thread.join(5.0)
    number = len(begun)
    time.sleep(0.5)
    assert len(begun) == number <= 4
    assert not list((folder / ".panfm").rglob("*.part"))


def test_images_are_not_read_far_ahead_of_what_is_written(folder, monkeypatch):
    done = []
    monkeypatch.setattr(
        cache_build, "read_with_digest", lambda *_: done.append(1) or (Packed(np.zeros((1, 8, 8, 8))), b"")
    )
    written = cache_build._read_all(_cached(folder), TYPES[32])
    for number, _ in enumerate(written, start=1):
        time.sleep(0.01)
        assert len(done) <= number + 2 * 2 + 1


def _cached(folder: Path) -> CachedStream:
    config = parse_run(RUN).streams["brain-mr"]
    sources = [(folder / f"{number}.nii.gz", NiftiReader()) for number in range(40)]
    return CachedStream(folder, "brain-mr", config, sources)


def test_a_cache_beyond_the_limit_is_refused_before_it_is_built(folder):
    set_limit(folder, "cache-gib", 1e-5)
    reason = asked(Site(folder), task().run_toml)
    assert reason == ("site alpha: LimitError: this run's images are too large, this site's limits.cache-gib is 1e-05")
    assert not list((folder / ".panfm").rglob("*.npy"))


def test_a_cache_beyond_the_disk_is_refused_before_it_is_built(folder, monkeypatch):
    monkeypatch.setattr(cache_build, "_free_bytes", lambda _: 1000)
    with pytest.raises(DataError, match=r"found 9\.31e-07 GiB free, expected 1\.14e-05 for the run's images"):
        open_store(folder, parse_run(RUN).streams)
    assert not list((folder / ".panfm").rglob("*.npy"))


def test_a_hundred_descriptions_do_not_fill_the_disk(folder):
    """Each with another spacing; the files of those before make room, and those in use stay."""
    limit = 20_000
    set_limit(folder, "cache-gib", limit / 2**30)
    for number in range(20):
        spacing = f"[{8.0 + number / 100}, 8.0, 8.0]"
        run = parse_run(hostile(brain_mr=stream("[8, 8, 8]", "[4, 4, 8]").replace("[8.0, 8.0, 8.0]", spacing)))
        store = open_store(folder, run.streams)
        files = list((folder / ".panfm" / "cache").iterdir())
        assert sum(2 * 512 * 6 for _ in files) <= limit
        assert all(np.isfinite(images).all() for images in store.images.values())
    assert len(files) == 3


def test_images_leave_room_for_ledger_and_private_state(folder, monkeypatch):
    """They were let fill the disk to its last byte."""
    monkeypatch.setattr(cache_build, "_free_bytes", lambda _: 15_000)
    with pytest.raises(DataError, match=r"expected 1\.14e-05 for the run's images and .* to spare"):
        open_store(folder, parse_run(RUN).streams)
    assert not list((folder / ".panfm").rglob("*.npy"))


def test_what_a_killed_build_left_is_removed(folder, monkeypatch):
    folder_of_cache = folder / ".panfm" / "cache"
    folder_of_cache.mkdir(parents=True)
    for name, age in (("old", 7200.0), ("new", 60.0)):
        path = folder_of_cache / f"{name}.part"
        path.write_bytes(bytes(1000))
        os.utime(path, (time.time() - age,) * 2)
    monkeypatch.setattr(cache_build, "_MAX_FILES", 2)
    open_store(folder, parse_run(RUN).streams)
    assert sorted(path.name for path in folder_of_cache.glob("*.part")) == ["new.part"]


def test_server_invents_run_ids_and_the_site_keeps_twenty(folder, monkeypatch):
    site, run_toml = Site(folder), task().run_toml
    runs = folder / ".panfm" / "state" / "runs"
    for number in range(20):
        (runs / f"made-up-{number}").mkdir(parents=True)
    records = Records(config={"run-id": "made-up-20", "round": 1, "run": run_toml})
    reason = str(answer(site, Frame(Kind.ROUND, records)).records.config["reason"])
    assert reason == (
        "site alpha: LimitError: limits.kept-runs is 20, and as many were at work within limits.idle-hours (24)"
    )
    os.utime(runs / "made-up-3", (time.time() - 90_000.0,) * 2)
    assert answer(site, Frame(Kind.ROUND, task(run_id="made-up-20").to_records())).kind is Kind.ANSWER
    assert sorted(path.name for path in runs.iterdir()) == sorted(f"made-up-{n}" for n in range(21) if n != 3)
    assert answer(site, Frame(Kind.ROUND, task(2, run_id="made-up-20").to_records())).kind is Kind.ANSWER


def test_a_run_whose_private_states_would_fill_the_disk_is_refused_before_images_are_read(folder, monkeypatch):
    monkeypatch.setattr("panfm.site.site.open_store", lambda *_: pytest.fail("images were read"))
    set_limit(folder, "state-gib", 0.004)
    assert ", this site's limits.state-gib is 0.004" in asked(Site(folder), task().run_toml)


def test_server_invents_run_ids_and_the_site_keeps_as_many_bytes_as_it_allows(folder):
    """Twenty runs of the largest model were 240 GiB and more."""
    limit = sizes_of(parse_run(RUN)).kept_bytes + 10_000_000
    set_limit(folder, "state-gib", limit / 2**30)
    site, runs = Site(folder), folder / ".panfm" / "state" / "runs"
    for name, size in (("old", 3_000_000), ("new", 9_000_000)):
        (runs / name).mkdir(parents=True)
        (runs / name / "round-000001.state").write_bytes(bytes(size))
    for path in (runs / "old" / "round-000001.state", runs / "old"):
        os.utime(path, (time.time() - 90_000.0,) * 2)
    assert answer(site, Frame(Kind.ROUND, task().to_records())).kind is Kind.ANSWER
    assert sorted(path.name for path in runs.iterdir()) == ["new", "run-1"]
    (runs / "new" / "round-000002.state").write_bytes(bytes(9_000_000))
    reason = str(answer(site, Frame(Kind.ROUND, task(2).to_records())).records.config["reason"])
    assert re.fullmatch(
        r"site alpha: LimitError: limits\.state-gib is [0-9.]+, "
        r"and runs that fill it were at work within limits\.idle-hours \(24\)",
        reason,
    )


@pytest.mark.parametrize(
    "extra", ["", '[sharing]\ncoding = "int8"\n', '[objective]\nname = "dino"\n', POOL + "experts = { count = 3 }\n"]
)
def test_a_private_state_is_no_larger_than_was_counted(folder, extra):
    asked = task(extra=extra)
    shared = {group: flat for group, flat in asked.groups.items() if group not in ("experts", "router")}
    Site(folder).train_round(replace(asked, groups=shared))
    (path,) = (folder / ".panfm" / "state" / "runs" / "run-1").glob("*.state")
    names_and_shapes = 2**20 - 2**16
    assert path.stat().st_size <= sizes_of(parse_run(asked.run_toml)).state_bytes - names_and_shapes


def test_models_of_earlier_descriptions_are_let_go():
    """Thirty-two of them were kept."""
    first = session._trainers(dump_toml(parse_run(RUN)), Trainer)(("brain-mr",))
    assert session._trainers(dump_toml(parse_run(RUN)), Trainer)(("brain-mr",)) is first
    session._trainers(dump_toml(parse_run(hostile(batch_size="4"))), Trainer)
    assert session._trainers.cache_info().maxsize == 1


@pytest.mark.parametrize("announced", [frames.MAX_ARRAYS, 10**9])
def test_a_frame_that_announces_gigabytes_takes_what_it_sends(announced):
    here, there = socket.socketpair()
    tracemalloc.start()
    with here, there:
        words = json.dumps(
            {"kind": "round", "arrays": [["a", "int8", announced]], "metrics": {}, "config": {}}
        ).encode()
        here.sendall(frames._HEADER.pack(frames._MAGIC, len(words), announced) + words + bytes(1000))
        here.close()
        with pytest.raises(ConnectionResetError):
            receive(there, timeout_s=5.0)
    assert tracemalloc.get_traced_memory()[1] < 4 * 2**20
    tracemalloc.stop()


def test_a_frame_holds_no_more_than_the_largest_model_of_the_site():
    here, there = socket.socketpair()
    with here, there:
        here.sendall(frames._HEADER.pack(frames._MAGIC, 0, 8001))
        with pytest.raises(Exception, match=r"frame: 0 \+ 8001 bytes, at most 1048576 \+ 8000 are taken"):
            receive(there, timeout_s=5.0, max_arrays=8000)


@pytest.mark.parametrize("kind", ["round", "handshake"])
def test_a_question_holds_no_more_than_the_model_of_its_own_description(folder, kind):
    """A site of any model took 400 MiB of arrays that no description asked for, and held them twice."""
    here, there = socket.socketpair()
    config = {"run-id": "run-1", "round": 1, "run": task().run_toml}
    words = json.dumps({"kind": kind, "arrays": [["x", "int8", 400 * 2**20]], "metrics": {}, "config": config}).encode()
    with here, there:
        here.sendall(frames._HEADER.pack(frames._MAGIC, len(words), 400 * 2**20) + words)
        here.shutdown(socket.SHUT_WR)
        assert Worker(folder, here)._receive(there) is None
        told = here.recv(1 << 16)
    assert b"ProtocolError: frame: 419430400 bytes of arrays, a " + kind.encode() in told


@pytest.mark.slow
def test_arrays_that_do_not_fit_their_list_are_refused_before_they_are_read():
    here, there = socket.socketpair()
    words = json.dumps({"kind": "round", "arrays": [["x", "int8", 3]], "metrics": {}, "config": {}}).encode()
    with here, there:
        here.sendall(frames._HEADER.pack(frames._MAGIC, len(words), 10**9) + words)
        with pytest.raises(ProtocolError, match="do not fit its list of arrays"):
            receive(there, timeout_s=5.0)


def test_a_site_that_set_no_limit_on_time_has_one():
    assert parse_site('name = "alpha"').limits.seconds_per_round == 86_400.0


def test_a_simulation_that_calls_sites_from_another_thread_goes_on_without_alarm():
    def wait() -> str:
        with time_limit(60.0):
            return "done"

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(wait).result() == "done"


def _nifti(shape: tuple[int, ...]) -> bytes:
    image = nib.Nifti1Image(np.zeros(shape, np.uint8), None)
    image.header.set_sform(np.eye(4), code=1)
    return bytes(image.to_bytes())


def _peak(block: Callable[[], object]) -> float:
    """MiB that a call fills on the way."""
    tracemalloc.start()
    try:
        block()
    finally:
        peak = tracemalloc.get_traced_memory()[1] / 2**20
        tracemalloc.stop()
    return peak


def test_a_gzip_bomb_is_unpacked_only_as_far_as_its_header_goes():
    bomb = gzip.compress(_nifti((4, 4, 4)) + bytes(300 * 2**20), compresslevel=1)

    def unpack() -> None:
        with pytest.raises(ImageError, match="more bytes than its header announces, expected 416"):
            decode_volume(bomb)

    assert _peak(unpack) < 10


def test_a_header_that_announces_more_than_there_is_fills_nothing():
    content = bytearray(_nifti((4, 4, 4)))
    struct.pack_into("<4h", content, 40, 3, 3000, 3000, 300)
    for file in (bytes(content), gzip.compress(content)):

        def unpack(file: bytes = file) -> None:
            with pytest.raises(ImageError, match=r"voxels that cannot be read \(416 of 2700000352 bytes\)"):
                decode_volume(file)

        assert _peak(unpack) < 10


@pytest.mark.slow
def test_a_sound_volume_under_a_memory_limit_is_read_or_told_as_memory(tmp_path):
    """Under a limit, every `.nii.gz` was said to be a broken gzip stream."""
    content = gzip.compress(_nifti((64, 64, 64)))
    (tmp_path / "scan.nii.gz").write_bytes(content)
    code = f"""
import resource, sys
from panfm.data.readers.nifti import decode_volume
from panfm.site.handler import limit_memory
content = open({str(tmp_path / "scan.nii.gz")!r}, "rb").read()
used = int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmData"))) / 2**20
limit_memory(used + 0.25)
print(decode_volume(content).voxels.shape)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "(64, 64, 64)\n", done.stderr


@pytest.mark.parametrize("error", [MemoryError(), OSError(12, "Cannot allocate memory"), LimitError("time is up")])
def test_what_is_not_the_files_fault_is_not_said_to_be(monkeypatch, error):
    def fail(*_: object, **__: object) -> None:
        raise error

    volume = gzip.compress(_nifti((4, 4, 4)))
    for place in ("gzip.open", "nib.Nifti1Image.from_bytes", "np.asanyarray"):
        with monkeypatch.context() as patch:
            patch.setattr(f"panfm.data.readers.nifti.{place}", fail)
            with pytest.raises(type(error)):
                decode_volume(volume)
    with monkeypatch.context() as patch:
        patch.setattr(picture.Image, "open", fail)
        with pytest.raises(type(error)):
            decode_picture(b"x")


@pytest.mark.parametrize(
    "error",
    [MemoryError(), OSError(12, "Cannot allocate memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")],
)
def test_memory_that_runs_out_is_told_as_memory(folder, monkeypatch, error):
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("panfm.site.site.open_store", fail)
    set_limit(folder, "memory-gib", 3.0)
    reason = asked(Site(folder), task().run_toml)
    assert reason == ("site alpha: LimitError: this run asks for more memory than there is: limits.memory-gib is 3")


def test_the_log_of_errors_does_not_grow_for_ever(folder, monkeypatch):
    monkeypatch.setattr("panfm.site.site._MAX_LOG_BYTES", 10_000)
    site = Site(folder)
    for _ in range(30):
        site.log_error(ValueError("\ud800" + "x" * 5000))
    sizes = [path.stat().st_size for path in site.state_dir.glob("site.log*")]
    assert len(sizes) == 2
    assert sum(sizes) < 40_000


def test_server_describes_hundreds_of_streams_and_their_model_is_counted_at_once():
    organs = [f"o{number}" for number in range(100)]
    streams = [
        f"{organ}-{modality}" for organ in organs for modality in ("fundus", "oct", "photo", "pathology", "xray")
    ]
    rows = "".join(f"{stream} = {{ shape = [16, 16], patch = [8, 8] }}\n" for stream in streams)
    run = parse_run(f'name = "wide"\norgans = {organs}\n[streams]\n{rows}')
    begin = time.process_time()
    assert sizes_of(run).parameters > 0
    assert time.process_time() - begin < 2.0
