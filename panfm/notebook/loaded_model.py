"""A trained model for Python: what `panfm.load` returns.

Shape legend: B subjects, P subjects that have a stream, C channels, `*shape` voxels of the stream, `*grid` its patches,
E numbers of an embedding, D width.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from panfm.config import RunConfig, StreamConfig
from panfm.data.read import read_image
from panfm.data.store import Batch, ImageStore
from panfm.errors import ConfigError
from panfm.evaluate.embed import by_session, embed_store
from panfm.evaluate.pooling_option import parse_pooling
from panfm.export.final_model import Source
from panfm.extras import needs_extra
from panfm.finetune.task_description import TASK_FILE, TaskDescription
from panfm.models import PanModel
from panfm.models.pan import SIZES
from panfm.models.pooling import check_layers
from panfm.notebook.notebook_images import FilesByStream, Images, Place, check_streams, files_of, stores_of
from panfm.notebook.token_grid import TokenGrid, stream_tokens, token_affines

if TYPE_CHECKING:
    import pandas

    from panfm.finetune.finetuned_model import SegmentedImage, TaskModel


class Encoder(nn.Module):
    """Encodes images of any of a model's streams; a plain module, to be fine-tuned or built upon.

    Guarantees:
        independent: a subject's embedding does not depend on the others of the batch (up to float rounding).
    """

    def __init__(self, model: PanModel) -> None:
        """Wrap a model; its heads, which only training needs, are taken off."""
        super().__init__()
        del model.heads
        self.model = model.requires_grad_(True)

    def forward(self, images: Mapping[str, Tensor], present: Mapping[str, Tensor] | None = None) -> Tensor:
        """Embed a batch of subjects.

        Args:
            images: Stream -> float32 [B, C, *shape] in [0, 1], as `Model.preprocess` gives them. Streams that nobody of
                the batch has are left out.
            present: Stream -> bool [B], the subjects who have it; all of them where left out. The images of the others
                may hold anything.
        Returns:
            Embeddings [B, E], pooled as the run's `[features]` say.
        Raises:
            ConfigError: no image, a stream that the model does not know, or another shape than the stream's.
        """
        return self.model.embed(self._batch(images, present or {}))

    def _batch(self, images: Mapping[str, Tensor], present: Mapping[str, Tensor]) -> Batch:
        check_streams(self.model.stream_configs, images)
        check_streams(images, present or images)
        sizes = {len(image) for image in images.values()}
        if len(sizes) != 1:
            raise ConfigError(f"images: found batches of {sorted(sizes)} subjects, expected one size for all streams")
        [size] = sizes
        rows = {}
        for name, image in images.items():
            config = self.model.stream_configs[name]
            if image.shape[1:] != (config.channels, *config.shape):
                expected = f"[B, {', '.join(map(str, (config.channels, *config.shape)))}]"
                raise ConfigError(f"{name}: found images {list(image.shape)}, expected {expected}")
            rows[name] = torch.nonzero(present.get(name, torch.ones(size))).squeeze(1)
        present_images = {name: image[rows[name]] for name, image in images.items() if len(rows[name])}
        return Batch(size, present_images, {name: rows[name] for name in present_images})


@dataclass(frozen=True)
class Model:
    """A run's trained model."""

    folder: Path
    """Folder that holds the model's weights."""
    run: RunConfig
    """Description of the run that made it."""
    metadata: Mapping[str, Any]
    """Facts about the model: sites, rounds, epsilon, streams, licence, intended use."""
    encoder: Encoder
    """The network, in inference mode. Experts that their sites kept are copies of the director."""
    task_model: "TaskModel | None" = None
    """Task and head of a fine-tuned model; None if the model was not fine-tuned."""

    @property
    def streams(self) -> Mapping[str, StreamConfig]:
        """Streams of the model, with the shape and spacing to which their images are brought."""
        return self.run.streams

    @property
    def embedding_size(self) -> int:
        """E: numbers of an embedding under the run's own pooling."""
        return self.encoder.model.embedding_size

    def preprocess(self, path: Place, stream: str) -> NDArray[np.float32]:
        """Read one image as the model does: resampled, cropped or padded, and scaled.

        Returns:
            float32 [C, *shape] in [0, 1]; a volume's axes run R, A, S.
        Raises:
            ConfigError: the model does not have the stream.
            DataError: the image is absent, unreadable, or of another kind than the stream's.
        """
        check_streams(self.streams, [stream])
        return read_image(Path(path), stream, self.streams[stream])

    @overload
    def embed(
        self, images: Images, *, pooling: str | None = None, frame: Literal[False] = False
    ) -> NDArray[np.float32]: ...

    @overload
    def embed(self, images: Images, *, pooling: str | None = None, frame: Literal[True]) -> "pandas.DataFrame": ...

    def embed(
        self, images: Images, *, pooling: str | None = None, frame: bool = False
    ) -> "NDArray[np.float32] | pandas.DataFrame":
        """Embed the images of one or more subjects, without gradients.

        Args:
            images: Stream -> path of one subject's image, or a list with one path per subject (None where a subject
                lacks the stream, of which it needs one); or a site folder; or an `ImageStore`.
            pooling: Instead of the run's, unwhitened: e.g. `cls`, `per-stream`, `layers`, `layers:8,10,12`.
            frame: Whether to return a data frame whose index names the subjects (needs the extra `evaluate`); files
                name a subject by the path of its first image.
        Returns:
            float32 [B, E], subjects in the order given.
        Raises:
            ConfigError, DataError: a stream, the pooling, a file or the site folder does not hold.
        """
        subjects: list[str] = []
        features = []
        with self._pooled(pooling) as network:
            for store in stores_of(images, self.streams):
                subjects += store.subjects
                features.append(embed_store(network, store, range(len(store.subjects))))
        table = np.concatenate(features)
        if not frame:
            return table
        with needs_extra("evaluate"):
            import pandas
        return pandas.DataFrame(table, index=pandas.Index(subjects, name="subject"))

    @property
    def task(self) -> TaskDescription | None:
        """The task that `predict` predicts: kind, names of outputs, classes. None if the model was not fine-tuned."""
        return None if self.task_model is None else self.task_model.task

    def predict(self, images: FilesByStream | Place) -> "NDArray[np.float32] | list[SegmentedImage | None]":
        """Predict labels or masks with a fine-tuned model, from the streams that each subject has.

        Args:
            images: As for `embed`, files or a site folder.
        Returns:
            For labels, float32 [B, K]: the probability of yes, or of each class, or the number, as `task.outputs` names
            them; for a subject of a site folder, the mean over its sessions. For a segmentation, a list with one mask
            per subject (from a site folder one per session; subjects in the manifest's order, sessions by name): a
            NIfTI image with the scan's own affine and shape, or a picture; None if the subject lacks the stream.
        Raises:
            ConfigError: the model was not fine-tuned, or a stream is unknown or missing.
            DataError: as `embed`.
        """
        if self.task_model is None:
            raise ConfigError(f"{self.folder}: was not fine-tuned, expected the folder of: panfm finetune")
        if (stream := self.task_model.task.stream) is None:
            return np.concatenate([self._predict_labels(store) for store in stores_of(images, self.streams)])
        files = files_of(images, self.streams)
        if stream not in files:
            raise ConfigError(f"images: found {', '.join(files)}, expected {stream}, which the model segments")
        masks: list[SegmentedImage | None] = []
        for store in stores_of(files, self.streams, may_be_empty=True):
            part = files[stream][len(masks) : len(masks) + len(store.subjects)]
            paths = {row: path for row, path in enumerate(part) if path is not None}
            of_row = dict(zip(paths, self.task_model.segment(self.encoder.model, store, paths), strict=True))
            masks += [of_row.get(row) for row in range(len(part))]
        return masks

    def _predict_labels(self, store: ImageStore) -> NDArray[np.float32]:
        from panfm.finetune.task_result import by_patient

        assert self.task_model is not None
        visits, sessions = by_session(store)
        outputs = self.task_model.predict(self.encoder.model, visits)
        return by_patient(outputs, visits.subjects).astype(np.float32) if sessions else outputs

    def tokens(self, images: FilesByStream | Place) -> dict[str, TokenGrid]:
        """Encode the images of one or more subjects to patch tokens, on the grid of each stream's patches.

        Args:
            images: As for `embed`, files or a site folder.
        Returns:
            Stream -> its tokens after the last norm, a row per subject (of a site: per session, subjects in the
            manifest's order and sessions by name); streams that nobody has are left out.
        Raises:
            ConfigError, DataError: as `embed`.
        """
        files = files_of(images, self.streams)
        values: dict[str, list[NDArray[np.float32]]] = {name: [] for name in files}
        for store in stores_of(files, self.streams, may_be_empty=True):
            for name, tokens in stream_tokens(self.encoder.model, store).items():
                values[name].append(tokens)
        grids = {}
        for name, chunks in values.items():
            if chunks:
                paths = {row: path for row, path in enumerate(files[name]) if path is not None}
                affines = token_affines(paths.values(), self.streams[name])
                grids[name] = TokenGrid(np.concatenate(chunks), np.array([*paths]), affines)
        return grids

    @contextmanager
    def _pooled(self, pooling: str | None) -> Iterator[PanModel]:
        """The network with another pooling, unwhitened, until the block ends; None leaves it as it is."""
        network = self.encoder.model
        before = network.pooling, network.whitening
        if pooling is not None:
            features = parse_pooling(pooling)
            check_layers(features, SIZES[self.run.model.size][1])
            network.pooling, network.whitening = features, None
        try:
            yield network
        finally:
            network.pooling, network.whitening = before


def load(place: Place) -> Model:
    """Read a trained model from disk, without touching any network.

    Args:
        place: Folder of a finished run, its `model/`, or an export (`safetensors`, `dense-vit`, `huggingface`).
    Raises:
        ConfigError: its run.toml does not hold.
        DataError: there is no model, or a file of it is damaged.

    >>> import panfm
    >>> model = panfm.load("runs/demo")
    >>> model.embed({"brain-mr": ["scans/a-t1.nii.gz", "scans/b-t1.nii.gz"]}).shape
    (2, 48)
    >>> model.tokens({"eye-fundus": "scans/b-eye.png"})["eye-fundus"].values.shape
    (1, 2, 2, 48)
    """
    source = Source.read(Path(place))
    encoder, task_model = Encoder(source.model), None
    if (source.folder / TASK_FILE).exists():
        from panfm.finetune.finetuned_model import read_task_model

        task_model = read_task_model(source.folder, source.model)
    return Model(source.folder, source.run, source.metadata, encoder, task_model)
