"""Runs one fine-tuning: reads a model and site folders, trains, scores, and writes a folder.

finetune.toml       the settings
checkpoint.state    state of the training, from which `--resume` goes on
masks/              for a segmentation: the predicted masks of the test images, and masks.csv
result.json         scores with 95 % intervals, patients, losses
model/              encoder and head of the best validation, for `panfm.load`; written last
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from panfm.config.features import FeaturesConfig
from panfm.errors import DataError
from panfm.evaluate.pooling_option import parse_pooling
from panfm.export.final_model import Source
from panfm.files import locked
from panfm.finetune.fine_tuning import FineTuning, choose_parts
from panfm.finetune.finetune_settings import FinetuneSettings, refuse_ended, write_settings
from panfm.finetune.finetuned_model import SegmentedImage, TaskModel, write_finetuned, write_mask
from panfm.finetune.starting_model import starting_model
from panfm.finetune.task_data import TaskData, read_task_data
from panfm.finetune.task_result import RESULT_FILE, FrozenFeatures, TaskResult, score_labels, score_segmentation
from panfm.outputs import write_table

Progress = Callable[[int, int], None]
"""Called with the number of images or steps done, and their total."""


@dataclass(frozen=True)
class FinetuneJob:
    """A fine-tuning whose input files have been read and checked; `run` trains it."""

    settings: FinetuneSettings
    folder: Path
    data: TaskData

    @classmethod
    def open(cls, settings: FinetuneSettings, folder: Path, progress: Progress = lambda *_: None) -> "FinetuneJob":
        """Read and check model, images, labels and masks.

        Raises:
            ConfigError: the model claims privacy, or does not have the parts, the streams or the pooling's layers.
            DataError: a file is not valid.
        """
        source = Source.read(Path(settings.model))
        model, _ = starting_model(source.folder, pooling=_pooling(settings))
        choose_parts(model, settings.parts, settings.seed)
        data = read_task_data(settings, source.run, progress)
        return cls(settings, folder, data)

    def run(self, progress: Progress = lambda *_: None) -> TaskResult:
        """Train from the start or from the checkpoint, score, and write everything.

        Raises:
            DataError: the folder holds a finished fine-tuning, a checkpoint of other settings or data, or another
                process is at work in it.
            RunError: a loss is not finite.
        """
        settings, folder, data = self.settings, self.folder, self.data
        refuse_ended(folder)
        source = Source.read(Path(settings.model))
        model, run = starting_model(source.folder, pooling=_pooling(settings), from_scratch=settings.from_scratch)
        heads = {name: value.clone() for name, value in model.state_dict().items() if name.startswith("heads.")}
        frozen = None if data.masked else FrozenFeatures.of(model, data)
        tuning = FineTuning(model, data, settings)
        folder.mkdir(parents=True, exist_ok=True)
        with _only_one(folder):
            tuning.load(folder)
            write_settings(folder, settings)
            tuning.run(folder, progress)
            task_model = TaskModel(data.task, tuning.head)
            if frozen is None:
                result = self._score_masks(task_model, tuning)
            else:
                result = score_labels(task_model, tuning.model, data, frozen)
            result = replace(result, notes=(*result.notes, *tuning.notes()))
            result.write(folder / RESULT_FILE, tuning.progress)
            metadata = source.metadata | {"task": data.task.name, "fine-tuned-on": data.num_patients()["train"]}
            write_finetuned(folder / "model", tuning.model, run, data.task, heads=heads, metadata=metadata)
            return result

    def _score_masks(self, task_model: TaskModel, tuning: FineTuning) -> TaskResult:
        """Score a segmentation on the test images, and write their predicted masks."""
        masks, rows = self.folder / "masks", list[tuple[str, str, str, str]]()
        masks.mkdir(exist_ok=True)
        stream = self.data.task.stream or ""

        def keep(index: int, mask: SegmentedImage) -> None:
            path = write_mask(masks / f"{len(rows) + 1:04d}", mask)
            image = self.data.masked[index].image
            rows.append((self.data.store.subjects[index], stream, str(image), path.name))

        result = score_segmentation(task_model, tuning.model, self.data, keep)
        write_table(masks / "masks.csv", ("subject", "stream", "image", "mask"), rows)
        return result


@contextmanager
def _only_one(folder: Path) -> Iterator[None]:
    """Lock a folder until the block ends. Raises DataError: another process is at work in it."""
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(folder / ".finetune.lock", wait_s=0.0))
        except BlockingIOError as error:
            raise DataError(f"{folder}: another process is at work in it, expected one at a time") from error
        refuse_ended(folder)
        yield


def _pooling(settings: FinetuneSettings) -> FeaturesConfig | None:
    return None if settings.pooling is None else parse_pooling(settings.pooling)
