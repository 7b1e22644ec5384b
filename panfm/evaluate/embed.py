"""Frozen features: a trained model read back from disk, applied to a store, written as `.npz`.

`features.npz` holds `subjects`, `splits`, `features` [N, dim], `streams` (names), `present` [N, streams], `pooling` and
`model_hash`, of subjects with sessions also `sessions`, and no pickled object.
"""

import hashlib
import io
import zipfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from panfm.config import RunConfig, load_run
from panfm.config.features import FeaturesConfig
from panfm.data.store import Batch, ImageStore
from panfm.errors import DataError, reason
from panfm.files import write_atomic
from panfm.models import PanModel, build_model
from panfm.models.private_part import load_with_fresh_private
from panfm.models.transfer import taskless_run, taskless_state
from panfm.models.whitening import read_whitening


class Embedder(Protocol):
    """Anything that turns a batch into one vector per subject."""

    def eval(self) -> object:
        """Go to inference mode."""

    def embed(self, batch: Batch) -> Tensor:
        """Features [B, dim]."""


def embed_store(
    model: Embedder,
    store: ImageStore,
    indices: Sequence[int] | NDArray[np.int64],
    streams: Iterable[str] | None = None,
    batch_size: int = 256,
    on_batch: Callable[[int], None] = lambda _: None,
) -> NDArray[np.float32]:
    """Features float32 [n, dim] of the subjects at `indices`, from all their streams or only those named.

    Args:
        on_batch: Told the number of subjects done after each batch.
    """
    model.eval()
    wanted, names = np.asarray(indices, dtype=np.int64), None if streams is None else tuple(streams)
    chunks = []
    with torch.inference_mode():
        for start in range(0, max(len(wanted), 1), batch_size):
            batch = store.batch(wanted[start : start + batch_size], names)
            chunks.append(model.embed(batch).float().cpu().numpy())
            on_batch(batch.size)
    return np.concatenate(chunks)


@dataclass(frozen=True)
class Features:
    """Frozen features of one place's subjects."""

    subjects: tuple[str, ...]
    splits: tuple[str, ...]
    streams: tuple[str, ...]
    present: NDArray[np.bool_]
    """[N, streams]: which streams the features were computed from."""
    features: NDArray[np.float32]
    """[N, dim]"""
    pooling: str
    """How they were read off the model: as `--pooling` says it, and whether they are whitened."""
    model_hash: str
    """SHA-256 of the weights file."""
    sessions: tuple[str, ...] = ()
    """Session of each row; empty where no subject has one, and there is one row per subject."""


def by_session(store: ImageStore) -> tuple[ImageStore, tuple[str, ...]]:
    """The store with every session as a subject of its own, and the session of each; as it is without sessions.

    Images without a session, of a store that has some, are a session of their own.
    """
    if not store.sessions:
        return store, ()
    names = {stream: store.sessions.get(stream, [""] * len(rows)) for stream, rows in store.rows.items()}
    pairs = {stream: list(zip(rows.tolist(), names[stream], strict=True)) for stream, rows in store.rows.items()}
    visits = sorted({pair for of_stream in pairs.values() for pair in of_stream})
    at = {visit: index for index, visit in enumerate(visits)}
    rows = {stream: np.array([at[pair] for pair in of_stream]) for stream, of_stream in pairs.items()}
    subjects, splits = ([table[row] for row, _ in visits] for table in (store.subjects, store.splits))
    by_visit = ImageStore(tuple(subjects), tuple(splits), store.images, rows, digests=store.digests)
    return by_visit, tuple(session for _, session in visits)


def mean_of_sessions(table: Features) -> Features:
    """The features with one row per subject: the mean of its sessions; as they are without sessions."""
    if not table.sessions:
        return table
    rows_of: dict[str, list[int]] = {}
    for row, subject in enumerate(table.subjects):
        rows_of.setdefault(subject, []).append(row)
    rows = list(rows_of.values())
    return replace(
        table,
        subjects=tuple(rows_of),
        splits=tuple(table.splits[own[0]] for own in rows),
        present=np.array([table.present[own].any(axis=0) for own in rows]),
        features=np.array([table.features[own].mean(axis=0) for own in rows]),
        sessions=(),
    )


def embed_site(
    folder: Path,
    model: PanModel,
    store: ImageStore,
    on_batch: Callable[[int], None] = lambda _: None,
    *,
    reader: Embedder | None = None,
) -> Features:
    """Features of all subjects of a store, session by session, by the model that was read from `folder`.

    Args:
        reader: Reads the model instead of its pooling.
    """
    store, sessions = by_session(store)
    everybody, streams = np.arange(len(store.subjects)), tuple(store.images)
    present = np.zeros((len(everybody), len(streams)), dtype=bool)
    for column, stream in enumerate(streams):
        present[store.rows[stream], column] = True
    features = embed_store(reader or model, store, everybody, streams, on_batch=on_batch)
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    pooling = model.pooling.pooling_text + (", whitened" if model.whitening else "") if reader is None else "tokens"
    return Features(store.subjects, store.splits, streams, present, features, pooling, digest, sessions)


def write_features(path: Path, table: Features) -> None:
    """Write one `.npz`, whole or not at all; equal features give equal bytes.

    Raises:
        DataError: the file cannot be written.
    """
    buffer = io.BytesIO()
    sessions: dict[str, Any] = {"sessions": np.array(table.sessions, dtype=np.str_)} if table.sessions else {}
    np.savez(
        buffer,
        subjects=np.array(table.subjects, dtype=np.str_),
        splits=np.array(table.splits, dtype=np.str_),
        streams=np.array(table.streams, dtype=np.str_),
        present=table.present,
        features=table.features,
        pooling=np.array(table.pooling),
        model_hash=np.array(table.model_hash),
        **sessions,
    )
    try:
        write_atomic(path, buffer.getvalue())
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror})") from error


def read_features(path: Path) -> Features:
    """Read what `write_features` wrote.

    Raises:
        DataError: the file is absent, not an `.npz` of ours, or its arrays disagree in length.
    """
    try:
        with path.open("rb") as handle, np.load(handle, allow_pickle=False) as file:
            names = [tuple(str(name) for name in file[key]) for key in ("subjects", "splits", "streams")]
            pooling, digest = (str(file[key]) for key in ("pooling", "model_hash"))
            sessions = tuple(str(name) for name in file["sessions"]) if "sessions" in file else ()
            present, features = file["present"], file["features"]
            table = Features(names[0], names[1], names[2], present, features, pooling, digest, sessions)
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file, expected features written by `panfm embed`") from error
    except (
        OSError,
        EOFError,
        KeyError,
        RuntimeError,
        ValueError,
        TypeError,
        AttributeError,
        zipfile.BadZipFile,
    ) as error:
        raise DataError(f"{path}: not a feature file written by `panfm embed` ({reason(error)})") from error
    lengths = {
        len(table.sessions or table.subjects),
        len(table.subjects),
        len(table.splits),
        len(table.features),
        len(table.present),
    }
    if len(lengths) != 1 or table.features.ndim != 2:
        raise DataError(f"{path}: subjects, splits and features disagree in length ({sorted(lengths)})")
    return table


def load_model(
    folder: Path, pooling: FeaturesConfig | None = None, *, whitened: bool = True
) -> tuple[PanModel, RunConfig]:
    """The model of a run's `model/` folder, and the run that made it.

    What sites kept to themselves is not there: private experts are copies of the director. The head of a task reads the
    run's own pooling: under another the model, and the run that is returned, have none.

    Args:
        pooling: How embeddings are read off the model, instead of as the run says; they are then not whitened.
        whitened: Whether the model gets the whitening of its folder, where there is one or the run asks for one.
    Raises:
        ConfigError: `run.toml` is absent or does not hold, the model does not have the pooling's layers, or its
            whitening was fitted under another pooling.
        DataError: the weights or the whitening are absent or unreadable, or do not fit the run's model.
    """
    run, path = load_run(folder / "run.toml"), folder / "model.safetensors"
    drops_task = pooling is not None and run.task is not None
    if pooling is not None:
        run = (taskless_run(run) if drops_task else run).model_copy(update={"features": pooling})
    try:
        weights = load_file(path)
    except (OSError, ValueError, SafetensorError) as error:
        raise DataError(f"{path}: expected a model's weights ({reason(error)})") from error
    model = build_model(run)
    try:
        shared = taskless_state(weights, model.split_state(run.sharing)[0]) if drops_task else weights
        load_with_fresh_private(model, run.sharing, shared, model.state_dict())
    except RuntimeError as error:
        first = " ".join(str(error).split())[:120]
        raise DataError(f"{path}: does not fit the model of run.toml: {first}") from error
    if pooling is None and whitened:
        text, streams = run.features.pooling_text, len(model.stream_names)
        model.whitening = read_whitening(folder, streams=streams, size=model.embedding_size, pooling=text)
        if run.features.whitening and model.whitening is None:
            raise DataError(
                f"{folder}: holds no whitening, which run.toml asks for, expected: panfm whiten {folder} SITE"
            )
    return model, run
