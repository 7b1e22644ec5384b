"""Reads images with labels or masks for a fine-tuning from site folders, and splits them by patient.

Each visit (session) of a patient is one example; all visits of a patient are in one split, and intervals are computed
over patients. The patients of all site folders are pooled; a patient of two folders is refused.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from panfm.config import RunConfig, StreamConfig, load_site
from panfm.data.cache import open_store
from panfm.data.label_kinds import LabelKinds, encode, infer_kinds, read_rules
from panfm.data.labels import LabelTable, read_cells
from panfm.data.manifest import Row, image_path, read_manifest
from panfm.data.masks import Classes, mask_to_grid, read_mask
from panfm.data.readers import ImageError, Picture, Volume, read_source
from panfm.data.store import ImageStore
from panfm.data.subjects import subject_key
from panfm.errors import ConfigError, DataError
from panfm.evaluate.embed import by_session
from panfm.finetune.finetune_settings import FinetuneSettings
from panfm.finetune.task_description import SEGMENTATION, Kind, TaskDescription, parse_task
from panfm.finetune.windows import LargeImage, covering
from panfm.seeds import numpy_generator

_MOST_CLASSES = 64
_VALIDATION_SHARE, _TEST_SHARE = 0.2, 0.25
"""Shares of the training patients that validate or test if the site has no patient in `val` or `test`."""

Indices = NDArray[np.int64]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class MaskedImage:
    """Paths of an image and of its mask."""

    image: Path
    mask: Path

    def read(self, config: StreamConfig) -> tuple[Volume | Picture, Classes]:
        """Read image and mask. Raises DataError, which begins with the path: a file is not valid."""
        path = self.image
        try:
            image = read_source(path, is_volume=config.is_volume, nan=config.nan)
            path = self.mask
            return image, read_mask(path, image)
        except ImageError as error:
            raise DataError(f"{path}: {error}") from error


@dataclass(frozen=True)
class TaskData:
    """All examples of a task: images, targets, and the split."""

    task: TaskDescription
    store: ImageStore
    """One row per example; a patient with several visits has several."""
    targets: NDArray[np.float64] | NDArray[np.uint8]
    """Labels [N, K], NaN where unknown, of survival event and time [N, 2]; or for a segmentation classes [N, *shape] on
    the stream's grid."""
    train: Indices
    validation: Indices
    test: Indices
    masked: Sequence[MaskedImage] = ()
    """For a segmentation: the files of every example."""
    large: Mapping[int, LargeImage] = field(default_factory=dict)
    """For a segmentation: example -> image and mask on a grid that covers the whole scan, where that is larger than the
    stream's."""
    notes: tuple[str, ...] = ()

    def patients(self, indices: Indices) -> list[str]:
        """Patient of each of some examples."""
        return [self.store.subjects[index] for index in indices]

    def num_patients(self) -> dict[str, int]:
        """Number of patients in each split: `train`, `validation`, `test`."""
        parts = {"train": self.train, "validation": self.validation, "test": self.test}
        return {name: len(set(self.patients(indices))) for name, indices in parts.items()}


def read_task_data(settings: FinetuneSettings, run: RunConfig, progress: Progress = lambda *_: None) -> TaskData:
    """Read and check everything that a fine-tuning needs, and split it.

    Raises:
        ConfigError: a stream is unknown, or a site description is not valid.
        DataError: a manifest, image, label or mask is not valid, or too few patients have a label or mask.
    """
    return divided(read_examples(settings, run, progress), settings)


def read_examples(settings: FinetuneSettings, run: RunConfig, progress: Progress = lambda *_: None) -> TaskData:
    """Read all images with a label or a mask, not yet split: all examples are in `train`.

    Raises:
        ConfigError, DataError: as `read_task_data`, apart from the number of patients.
    """
    streams = chosen_streams(settings.streams, run.streams)
    folders = [Path(folder) for folder in settings.data]
    label = parse_task(settings.task)
    if label is None:
        return _read_segmentation(settings, streams, folders, progress)
    return _read_labels(*label, settings.time, streams, folders, progress)


def chosen_streams(names: Sequence[str], streams: Mapping[str, StreamConfig]) -> dict[str, StreamConfig]:
    """Choose streams by name; all if no name is given. Raises ConfigError: the model lacks a stream."""
    if unknown := [name for name in names if name not in streams]:
        raise ConfigError(f"--streams: found {unknown[0]!r:.80}, expected some of {', '.join(streams)}")
    return {name: config for name, config in streams.items() if name in names or not names}


def _read_labels(
    table: str,
    column: str,
    time: str | None,
    streams: Mapping[str, StreamConfig],
    folders: Sequence[Path],
    progress: Progress,
) -> TaskData:
    """Read the examples of a task of labels: the visits of patients whose label is known, and for survival the time."""
    tables = [read_cells(_table_path(table, folder)) for folder in folders]
    task, values, notes = _task_of_labels(column, time, tables)
    stores = [_visits(folder, streams, progress) for folder in folders]
    width = 2 if task.kind == "survival" else len(task.outputs)
    targets = np.full((sum(len(store.subjects) for store, _ in stores), width), np.nan)
    at = 0
    for (store, _), known in zip(stores, values, strict=True):
        for subject in store.subjects:
            targets[at] = known.get(subject_key(subject), np.nan)
            at += 1
    store = _joined(folders, [store for store, _ in stores])
    labelled = np.flatnonzero(np.isfinite(targets).all(axis=1))
    if not len(labelled):
        raise DataError(f"{tables[0].path}: found no label of a patient of the site, expected the manifest's subjects")
    missing = len(set(store.subjects)) - len({store.subjects[index] for index in labelled})
    label = "a label" if time is None else f"a label or {time}"
    notes += [f"{column}: {missing} patients without {label} are left out"] if missing else []
    imaged = {subject_key(subject) for subject in store.subjects}
    without_image = len({subject for known in values for subject in known} - imaged)
    notes += [f"{column}: {without_image} labelled patients without an image are left out"] if without_image else []
    nobody = np.empty(0, dtype=np.int64)
    return TaskData(task, store, targets, labelled, nobody, nobody, notes=tuple(notes))


def _table_path(named: str, folder: Path) -> Path:
    """Find a label table: in the site folder, else relative to the working directory."""
    inside = folder / named
    return inside if inside.exists() or not Path(named).exists() else Path(named)


def _task_of_labels(
    column: str, time: str | None, tables: Sequence[LabelTable]
) -> tuple[TaskDescription, list[dict[str, NDArray[np.float64]]], list[str]]:
    """Infer the task of a column; return it, each table's labels by `subject_key`, and notes on how cells were read."""
    columns = [column] if time is None else [column, time]
    for table in tables:
        if absent := [name for name in columns if name not in table.cells]:
            known = ", ".join(table.cells) or "none"
            raise DataError(f"{table.path}: found no column {absent[0]!r:.80}, expected one of {known}")
    tables = [replace(table, cells={name: table.cells[name] for name in columns}) for table in tables]
    rules = {name: rule for name, rule in read_rules(tables).items() if name in columns}
    kinds = infer_kinds(tables, rules)
    kind = kinds.by_column[column].kind
    if kind == "ignore":
        why = next((note for note in kinds.notes if note.startswith(f"{column}: ")), f"{column}: is to be ignored")
        raise DataError(f"{tables[0].path}: {why}")
    if time is not None:
        _check_survival(column, time, kinds, tables[0].path)
    labels = [encode(table, kinds.by_column) for table in tables]
    if any((np.abs(own.values) > np.finfo(np.float32).max).any() for own in labels):
        raise DataError(f"{tables[0].path}: {column}: found a number beyond float32, expected up to 3e38")
    values = [{subject_key(name): row for name, row in zip(own.subjects, own.values, strict=True)} for own in labels]
    if time is None:
        task = TaskDescription(kind=kind, name=column, outputs=labels[0].names)
    else:
        task = TaskDescription(kind="survival", name=column, outputs=(column,), time=time)
        if any((own.values[:, 1] < 0.0).any() for own in labels):
            raise DataError(f"{tables[0].path}: {time}: found a time below 0, expected time since the image")
    return task, values, list(kinds.notes)


def _check_survival(column: str, time: str, kinds: LabelKinds, path: Path) -> None:
    """Raise DataError if the columns of a survival task are not yes or no, and a number."""
    for name, expected in ((column, "yes-no"), (time, "number")):
        if (kind := kinds.by_column[name].kind) != expected:
            told = {"yes-no": "an event that is yes or no", "number": "a number of days, months or years"}[expected]
            why = next((f" ({note})" for note in kinds.notes if note.startswith(f"{name}: ")), "")
            raise DataError(f"{path}: {name}: found {kind}{why}, expected {told}, for --time")


def _read_segmentation(
    settings: FinetuneSettings, streams: Mapping[str, StreamConfig], folders: Sequence[Path], progress: Progress
) -> TaskData:
    """Read the examples of a segmentation: the images that have a mask."""
    stream = _masked_stream(settings.masked_stream, streams, folders)
    stores, masked, without_mask = [], list[MaskedImage](), 0
    for folder in folders:
        store, sessions = _visits(folder, streams, progress)
        files = _masked_files(folder, stream)
        visits = [files.get(visit) for visit in zip(store.subjects, sessions, strict=True)]
        with_image = np.isin(np.arange(len(visits)), store.rows.get(stream, ()))
        kept = np.flatnonzero(with_image & np.array([visit is not None for visit in visits]))
        without_mask += int(with_image.sum()) - len(kept)
        stores.append(only(store, kept))
        masked += [visit for index in kept if (visit := visits[index]) is not None]
    store = _joined(folders, stores)
    values_of, targets, large = _read_masks(masked, stream, streams[stream], progress)
    values = tuple(sorted({0}.union(*values_of)))
    notes = [f"{stream}: {without_mask} images without a mask are left out"] if without_mask else []
    notes += [f"{stream}: {len(large)} scans are larger than its grid, read by windows"] if large else []
    notes += _notes_of_numbers(folders, [len(store.subjects) for store in stores], values_of)
    outputs = tuple(str(value) for value in values)
    task = TaskDescription(kind="segmentation", name=SEGMENTATION, outputs=outputs, values=values, stream=stream)
    nobody = np.empty(0, dtype=np.int64)
    return TaskData(task, store, targets, np.arange(len(masked)), nobody, nobody, masked, large, tuple(notes))


def _notes_of_numbers(folders: Sequence[Path], sizes: Sequence[int], values_of: Sequence[set[int]]) -> list[str]:
    """One note if the masks of some folders hold other numbers than those of others.

    Args:
        sizes: Number of masks of each folder.
        values_of: Numbers in each mask, folder after folder.
    """
    ends = np.cumsum(sizes)
    of_folder = [
        ", ".join(map(str, sorted(set[int]().union(*values_of[end - size : end]) - {0}))) or "nothing"
        for size, end in zip(sizes, ends, strict=True)
    ]
    if len(set(of_folder)) == 1:
        return []
    told = "; ".join(f"{folder}: {numbers}" for folder, numbers in zip(folders, of_folder, strict=True))
    return [f"masks hold different class numbers ({told}); one number must mean one class everywhere"]


def _masked_stream(named: str | None, streams: Mapping[str, StreamConfig], folders: Sequence[Path]) -> str:
    """Choose the stream to segment. Raises ConfigError: it has no masks, or none is named and several have masks."""
    rows = [row for folder in folders for row in read_manifest(folder, load_site(folder))]
    masked = sorted({row.stream for row in rows if row.mask and row.stream in streams})
    if named is not None and named not in masked:
        raise ConfigError(f"--stream: found {named!r:.80}, expected a stream with masks: {', '.join(masked) or 'none'}")
    if named is None and len(masked) != 1:
        given = f"masks of {', '.join(masked)}" if masked else "no mask of the run's streams"
        remedy = "--stream to say which" if masked else "the column mask of the manifest to name some"
        raise ConfigError(f"{folders[0]}: found {given}, expected {remedy}")
    return named or masked[0]


def _masked_files(folder: Path, stream: str) -> dict[tuple[str, str], MaskedImage]:
    """(Subject, session) -> image and mask, for each visit of a site that has a mask."""
    site = load_site(folder)
    rows: list[Row] = [row for row in read_manifest(folder, site) if row.stream == stream and row.mask]
    return {
        (row.subject, row.session): MaskedImage(image_path(folder, site, row.path), image_path(folder, site, row.mask))
        for row in rows
    }


def _read_masks(
    masked: Sequence[MaskedImage], stream: str, config: StreamConfig, progress: Progress
) -> tuple[list[set[int]], NDArray[np.uint8], dict[int, LargeImage]]:
    """Read masks; return the numbers in each, the masks on the stream's grid [N, *shape] as class indices, and the
    images that are larger than the grid.

    A class index is the place of a mask's number among the sorted numbers of all masks; 0 is background.
    """
    values: set[int] = {0}
    values_of = []
    for done, files in enumerate(masked, start=1):
        values_of.append(set(np.unique(files.read(config)[1]).tolist()))
        values |= values_of[-1]
        if len(values) > _MOST_CLASSES:
            raise DataError(
                f"{files.mask}: found more than {_MOST_CLASSES} classes, expected few, with 0 as background"
            )
        progress(done, 2 * len(masked))
    if len(values) == 1:
        raise DataError(f"{masked[0].mask}: found nothing but background in all masks, expected a class above 0")
    ordered = tuple(sorted(values))
    grids, large = np.empty((len(masked), *config.shape), dtype=np.uint8), {}
    for number, files in enumerate(masked):
        image, mask = files.read(config)
        grids[number] = mask_to_grid(mask, image, ordered, config)
        if cover := covering(image, config):
            large[number] = LargeImage.of(image, mask, stream, ordered, cover)
        progress(len(masked) + number + 1, 2 * len(masked))
    return values_of, grids, large


def _visits(
    folder: Path, streams: Mapping[str, StreamConfig], progress: Progress
) -> tuple[ImageStore, tuple[str, ...]]:
    """Read the images of a site, one row per visit, and the session of each row; empty text without sessions."""
    store = open_store(folder, streams, progress=lambda _, done, total: progress(done, total))
    visits, sessions = by_session(store)
    return visits, sessions or ("",) * len(visits.subjects)


def only(store: ImageStore, kept: Indices) -> ImageStore:
    """Reduce a store to some of its rows, which are given in ascending order."""
    place = {int(index): at for at, index in enumerate(kept)}
    images, rows, digests = {}, {}, {}
    for name, of_stream in store.rows.items():
        chosen = [at for at, row in enumerate(of_stream.tolist()) if row in place]
        digests[name] = [store.digests[name][at] for at in chosen if name in store.digests]
        if chosen:
            whole = len(chosen) == len(of_stream)
            images[name] = store.images[name] if whole else store.images[name][chosen]
            rows[name] = np.array([place[int(of_stream[at])] for at in chosen], dtype=np.int64)
    subjects, splits = (tuple(table[index] for index in kept) for table in (store.subjects, store.splits))
    return ImageStore(subjects, splits, images, rows, digests=digests)


def _joined(folders: Sequence[Path], stores: Sequence[ImageStore]) -> ImageStore:
    """Join the rows of all sites, site after site. Raises DataError: two sites share a patient or an image."""
    seen: dict[str, int] = {}
    for number, store in enumerate(stores):
        for subject in store.subjects:
            if (first := seen.setdefault(subject_key(subject), number)) != number:
                given = f"subject {subject!r}, which stands in {folders[first]}"
                raise DataError(f"{folders[number]}: found {given}, expected each patient in one --data")
    _refuse_twins(folders, stores)
    if len(stores) == 1:
        return stores[0]
    offsets = np.cumsum([0, *(len(store.subjects) for store in stores)])
    names = dict.fromkeys(name for store in stores for name in store.images)
    parts = {
        name: [(store, offset) for store, offset in zip(stores, offsets, strict=False) if name in store.images]
        for name in names
    }
    return ImageStore(
        tuple(subject for store in stores for subject in store.subjects),
        tuple(split for store in stores for split in store.splits),
        {name: np.concatenate([store.images[name] for store, _ in own]) for name, own in parts.items()},
        {name: np.concatenate([store.rows[name] + offset for store, offset in own]) for name, own in parts.items()},
        digests={name: [one for store, _ in own for one in store.digests.get(name, ())] for name, own in parts.items()},
    )


def _refuse_twins(folders: Sequence[Path], stores: Sequence[ImageStore]) -> None:
    """Raise DataError if two sites have an image of the same content, even under different subjects."""
    seen: dict[bytes, tuple[int, str]] = {}
    for number, store in enumerate(stores):
        for name, digests in store.digests.items():
            for row, digest in zip(store.rows.get(name, ()), digests, strict=True):
                subject = store.subjects[row]
                first, twin = seen.setdefault(digest, (number, subject))
                if first != number:
                    given = f"the same {name} image for subject {subject!r} and for {twin!r} of {folders[first]}"
                    raise DataError(f"{folders[number]}: found {given}, expected each patient in one --data")


def divided(data: TaskData, settings: FinetuneSettings) -> TaskData:
    """Split the examples into training, validation and test by patient.

    The site's own splits are used. If no patient is in `test`, a quarter of the patients is drawn for it; if no patient
    is in `val`, or `--patients` is given, a fifth of the training patients validates. Drawn patients have the classes
    of a label in the same shares as all.

    Raises:
        DataError: fewer than two patients are left to train and validate, they are of one class, or `--patients` asks
            for more than there are.
    """
    split_of: dict[str, str] = {}
    class_of: dict[str, object] = {}
    for index in data.train.tolist():
        subject = data.store.subjects[index]
        split_of.setdefault(subject, data.store.splits[index])
        class_of.setdefault(subject, _class(data, index))
    by_split = {name: [one for one, split in split_of.items() if split == name] for name in ("train", "val", "test")}
    notes = [*data.notes]

    def draw(pool: Sequence[str], count: int, purpose: str) -> list[str]:
        return draw_patients(pool, class_of, count, seed=settings.seed, purpose=purpose)

    train, validation, test = by_split.values()
    if not test:
        kept = draw(train, len(train) - round(_TEST_SHARE * len(train)), "kept")
        test = [one for one in train if one not in set(kept)]
        train = [one for one in train if one in set(kept)]
        notes.append(
            f"no patient in the split test: {len(test)} of {len(test) + len(train)} drawn for it from the split train, "
            "whose images pre-training may have seen"
        )
    if settings.patients is not None:
        if settings.patients > len(train):
            raise DataError(
                f"--patients: found {settings.patients}, expected at most {len(train)} (in the split train)"
            )
        train, validation = draw(train, settings.patients, "few labels"), []
    if not validation and len(train) > 1:
        kept = draw(train, len(train) - max(1, round(_VALIDATION_SHARE * len(train))), "training")
        validation = [one for one in train if one not in set(kept)]
        train = kept
        notes.append(f"{len(validation)} of {len(validation) + len(train)} training patients drawn for validation")
    for name, patients in (("train", train), ("validation", validation), ("test", test)):
        is_asked = settings.patients is not None and name != "test"
        place = f"--patients {settings.patients}" if is_asked else settings.data[0]
        if not patients:
            raise DataError(f"{place}: found no labelled patient for {name}, expected a few labelled ones")
        if _is_one_class(data.task.kind, {class_of[one] for one in patients}):
            if name == "train":
                given = f"{len(patients)} patients to train on, all with the same {data.task.name}"
                expected = "an event" if data.task.kind == "survival" else "patients of two classes at least"
                raise DataError(f"{place}: found {given}, expected {expected}")
            notes.append(f"{data.task.name}: the same for all {len(patients)} {name} patients")
    subjects = np.array(data.patients(data.train))
    parts = [data.train[np.isin(subjects, who)] for who in (train, validation, test)]
    if data.masked:
        trained = set(np.unique(data.targets[parts[0]]).tolist())
        absent = [name for number, name in enumerate(data.task.outputs) if number not in trained]
        notes += [f"class {name}: in no training mask, cannot be learned" for name in absent]
    return replace(data, train=parts[0], validation=parts[1], test=parts[2], notes=tuple(notes))


def _class(data: TaskData, index: int) -> object:
    """Class of an example, by which patients are drawn in proportion: for survival whether the event came; None for
    numbers and masks."""
    match data.task.kind:
        case "yes-no" | "classes":
            return tuple(data.targets[index].tolist())
        case "survival":
            return bool(data.targets[index, 0])
    return None


def _is_one_class(kind: Kind, classes: set[object]) -> bool:
    """Whether all patients are of one class; for survival, whether none has an event."""
    if kind == "survival":
        return classes == {False}
    return kind in ("yes-no", "classes") and len(classes) == 1


def draw_patients(
    pool: Sequence[str], class_of: Mapping[str, object], count: int, *, seed: int, purpose: str
) -> list[str]:
    """Draw `count` patients at random by the seed, of each class in proportion.

    Guarantees:
        classes: as far as `count` allows, every class has at least one drawn patient and, if it has two patients or
            more, at least one that is not drawn.
    """
    shuffled = [str(one) for one in numpy_generator(seed, "fine-tuning", purpose).permutation(sorted(pool))]
    members: dict[object, list[str]] = {}
    for one in shuffled:
        members.setdefault(class_of[one], []).append(one)
    drawn = dict.fromkeys(members, 0)

    def urgency(of_class: object) -> tuple[bool, bool, float]:
        size, so_far = len(members[of_class]), drawn[of_class]
        return so_far == 0, so_far < size - 1, count * size / len(pool) - so_far

    for _ in range(count):
        drawn[max((name for name in members if drawn[name] < len(members[name])), key=urgency)] += 1
    return [one for of_class, number in drawn.items() for one in members[of_class][:number]]
