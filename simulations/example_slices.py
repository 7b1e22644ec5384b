"""Makes the report's example slices: a held-out image, the same with hidden patches, and these patches predicted.

A model predicts features of hidden patches, not their pixels. A ridge regression, fitted on training subjects of the
sites, predicts from these features how a patch of the middle slice differs from the mean patch at its place. The report
shows by how much its error on held-out subjects is below that of the mean patch alone. Masks are random, with the run's
ratio of hidden patches.

Shape legend: B subjects, K hidden patches, D width, N hidden patches of the middle slice, F pixels of a patch of it.
"""

import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from panfm.config import RunConfig, StreamConfig
from panfm.data.store import Batch, ImageStore
from panfm.models import PanModel
from panfm.models.patch_features import patchify
from panfm.registry import import_class
from panfm.report.report_data import Example, Examples
from panfm.seeds import torch_generator
from panfm.sharing.groups import HEAD, is_shared
from panfm.training.objectives.interface import StudentOutput, student_output
from panfm.training.token_mask import build_policy, draw_mask
from simulations.cohorts.opened import OpenedCohort
from simulations.embedding_map import drawn_subjects

Floats = NDArray[np.float64]

_FIT_SUBJECTS, _TEST_SUBJECTS, _MOST_STREAMS = 200, 50, 10
_LEAST_ROWS, _MOST_ROWS = 20, 1000
_SIDE, _BATCH = 128, 16
_HIDDEN = (64, 112, 168)
"""Colour of hidden patches, RGB."""
_PENALTIES = (10.0, 100.0, 1e3, 1e4, 1e5)


@dataclass(frozen=True)
class Hidden:
    """Hidden patches in the middle slices of one stream: place, predicted features, true pixels."""

    subject: NDArray[np.int64]
    """[N] row of the subject in the batch."""
    token: NDArray[np.int64]
    """[N] index of the patch in the slice, row-major."""
    features: Floats
    """[N, D] predicted features; [N, 0] without predictions."""
    pixels: Floats
    """[N, F] true pixels."""


def example_slices(run: RunConfig, model: PanModel, opened: OpenedCohort) -> Examples | None:
    """Make example slices of one held-out image per stream, for ten streams at most; None if nobody is held out."""
    with_predictions = _predicts(run)
    test = opened.holdout.store
    held_out = test.holders(test.indices("test"), model.stream_names)
    streams = [name for name in model.stream_names if len(test.holders(held_out, [name]))][:_MOST_STREAMS]
    if not streams:
        return None
    quota = max(_FIT_SUBJECTS // len(opened.sites), 1)
    fitted = []
    for name, store in opened.stores.items():
        subjects = drawn_subjects(run, store.holders(store.indices("train"), streams), quota, "slices", name)
        fitted.append(_hidden(run, model, store, subjects, name))
    shown = np.unique(np.concatenate([test.holders(held_out, [name])[:_TEST_SUBJECTS] for name in streams]))
    hidden = _hidden(run, model, test, shown, "held out")
    rows, error = [], {}
    for stream in streams:
        own, known = hidden[stream], [place[stream] for place in fitted if stream in place]
        predicted = None
        if with_predictions and sum(len(part.token) for part in known) >= _LEAST_ROWS and len(own.token):
            predicted, mean = _predicted(known, own)
            error[stream] = _mean_square(predicted - own.pixels), _mean_square(mean - own.pixels)
        row = int(np.flatnonzero(np.isin(shown, test.rows[stream]))[0])
        image = test.batch(shown[[row]], [stream]).images[stream][0].numpy()
        here = own.subject == row
        rows.append(
            _example(
                stream, run.streams[stream], image, own.token[here], None if predicted is None else predicted[here]
            )
        )
    fit_subjects = sum(len({subject for hidden in place.values() for subject in hidden.subject}) for place in fitted)
    return Examples(rows, run.masking.ratio, fit_subjects if error else 0, error)


def png_files(examples: Examples) -> dict[str, bytes]:
    """Example slices as PNG files by name, such as `slices/brain-mr/masked`, for loggers."""
    kinds = ("input", "masked", "prediction")
    slices = {f"slices/{row.stream}/{kind}": getattr(row, kind) for row in examples.rows for kind in kinds}
    return {name: base64.b64decode(png) for name, png in slices.items() if png}


def _predicts(run: RunConfig) -> bool:
    """Whether the shared model predicts features of hidden patches."""
    needs: bool = import_class(run.objective.implementation).needs_predictions
    return needs and is_shared(run.sharing, HEAD) and run.model.positions != "rotary"


def _hidden(
    run: RunConfig, model: PanModel, store: ImageStore, subjects: NDArray[np.int64], purpose: str
) -> dict[str, Hidden]:
    """Hide patches of some subjects at random, and return those of each stream's middle slice."""
    masks = torch_generator(run.seed, "report", "masks", purpose)
    streams = [name for name in model.stream_names if name in store.images]
    parts: dict[str, list[Hidden]] = {}
    for first in range(0, len(subjects), _BATCH):
        batch = store.batch(subjects[first : first + _BATCH], streams)
        for stream, hidden in _hidden_in_batch(run, model, batch, masks).items():
            parts.setdefault(stream, []).append(replace(hidden, subject=hidden.subject + first))
    return {stream: _joined(own) for stream, own in parts.items()}


def _joined(parts: Sequence[Hidden]) -> Hidden:
    return Hidden(*(np.concatenate([getattr(part, own.name) for part in parts]) for own in fields(Hidden)))


@torch.inference_mode()
def _hidden_in_batch(run: RunConfig, model: PanModel, batch: Batch, masks: torch.Generator) -> dict[str, Hidden]:
    model.eval()
    features = model.patch_features(batch.to(model.stream_of_patch.device))
    policy = build_policy(run.masking.model_copy(update={"policy": "random"}), model.stream_organs)
    equal = torch.ones(1, len(model.stream_names), device=model.stream_of_patch.device)
    mask = draw_mask(policy, equal, model.layout(features), model.stream_of_patch, step=0, generator=masks)
    output = student_output(model, features, mask, predicts=_predicts(run))
    return {stream: _of_stream(run, stream, model, batch, output) for stream in batch.images}


def _of_stream(run: RunConfig, stream: str, model: PanModel, batch: Batch, output: StudentOutput) -> Hidden:
    config = run.streams[stream]
    hidden, number = output.mask.hidden, model.stream_names.index(stream)
    is_here = hidden.valid & (model.stream_of_patch[hidden.patch_index] == number)
    rows, columns = torch.nonzero(is_here, as_tuple=True)
    first = int((model.stream_of_patch < number).sum())
    is_shown, token = _in_slice(config, (hidden.patch_index[rows, columns] - first).cpu().numpy())
    subject = rows.cpu().numpy()[is_shown]
    predicted = output.predictions[rows, columns] if _predicts(run) else output.predictions.new_empty(len(rows), 0)
    image_of = np.full(batch.size, -1)
    image_of[batch.rows[stream].numpy()] = np.arange(len(batch.rows[stream]))
    pixels = _slice_patches(config, batch.images[stream])[image_of[subject], token[is_shown]]
    return Hidden(subject, token[is_shown], predicted.double().cpu().numpy()[is_shown], pixels.double().numpy())


def _in_slice(stream: StreamConfig, token: NDArray[np.int64]) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """Whether each patch of an image lies in its middle slice, and its index there; in a picture all patches do."""
    if len(stream.shape) == 2:
        return np.ones(len(token), dtype=np.bool_), token
    depth, patch = stream.grid[2], stream.patch[2]
    return token % depth == stream.shape[2] // 2 // patch, token // depth


def _middle(stream: StreamConfig, images: torch.Tensor) -> torch.Tensor:
    """Middle slices [P, C, X, Y] along the last axis of volumes; pictures are returned unchanged."""
    return images if len(stream.shape) == 2 else images[..., stream.shape[2] // 2]


def _slice_patches(stream: StreamConfig, images: torch.Tensor) -> torch.Tensor:
    """Patches [P, T, F] of the middle slices of images."""
    return patchify(_middle(stream, images), stream.patch[:2])


def _predicted(known: Sequence[Hidden], hidden: Hidden) -> tuple[Floats, Floats]:
    """Predict the pixels [N, F] of hidden patches in two ways: by the mean patch at the same place plus a difference
    that the ridge regression reads from the features, and by the mean patch alone."""
    from sklearn.linear_model import RidgeCV

    features, pixels, token = (
        np.concatenate([getattr(part, name) for part in known]) for name in ("features", "pixels", "token")
    )
    mean_features, mean_pixels = _at_places(features, token), _at_places(pixels, token)
    inputs, rest = features - mean_features(token), pixels - mean_pixels(token)
    scale, step = inputs.std(axis=0) + 1e-6, -(-len(inputs) // _MOST_ROWS) or 1
    ridge = RidgeCV(alphas=_PENALTIES).fit((inputs / scale)[::step], rest[::step])
    mean = mean_pixels(hidden.token)
    return mean + ridge.predict((hidden.features - mean_features(hidden.token)) / scale), mean


def _at_places(values: Floats, token: NDArray[np.int64]) -> Callable[[NDArray[np.int64]], Floats]:
    """Return a function from places to the mean of the values there; without values there, the mean of all."""
    overall = values.mean(axis=0)
    means = {place: values[token == place].mean(axis=0) for place in np.unique(token).tolist()}
    return lambda places: np.array([means.get(place, overall) for place in places.tolist()])


def _mean_square(values: Floats) -> float:
    return float(np.square(values).mean())


def _example(
    stream: str, config: StreamConfig, image: NDArray[np.float32], token: NDArray[np.int64], predicted: Floats | None
) -> Example:
    """Make the pictures of one image whose patches at `token` are hidden.

    Args:
        predicted: Pixels [N, F] of the hidden patches; None without predictions.
    """
    whole = _slice_patches(config, torch.from_numpy(image)[None])[0].numpy()
    span = float(whole.min()), float(whole.max())
    is_hidden = np.zeros(len(whole), dtype=np.bool_)
    is_hidden[token] = True
    filled = whole.copy()
    if predicted is not None:
        filled[token] = predicted
    original, masked = _png(config, whole, span), _png(config, whole, span, is_hidden)
    return Example(stream, original, masked, None if predicted is None else _png(config, filled, span))


def _png(
    stream: StreamConfig,
    patches: NDArray[np.float32],
    span: tuple[float, float],
    marked: NDArray[np.bool_] | None = None,
) -> str:
    """Write a slice as a PNG in base64, with the hidden patches in one colour.

    Args:
        patches: [T, F]
        span: Values that are shown as black and white.
    """
    low, high = span
    grey = np.clip((patches - low) / (high - low if high > low else 1.0), 0.0, 1.0) * 255
    channels, (rows, columns), (height, width) = stream.channels, stream.grid[:2], stream.patch[:2]
    by_channel = grey.reshape(len(patches), channels, -1)
    coloured = by_channel if channels == 3 else np.repeat(by_channel[:, :1], 3, axis=1)
    if marked is not None:
        coloured[marked] = np.array(_HIDDEN)[:, None]
    blocks = coloured.reshape(rows, columns, 3, height, width)
    picture = blocks.transpose(0, 3, 1, 4, 2).reshape(rows * height, columns * width, 3)
    if len(stream.shape) == 3:  # right to left, front to back -> as seen from the feet
        picture = picture.transpose(1, 0, 2)[::-1]
    shown = Image.fromarray(np.ascontiguousarray(picture.round().astype(np.uint8)))
    shown.thumbnail((_SIDE, _SIDE))
    buffer = io.BytesIO()
    shown.save(buffer, "PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()
