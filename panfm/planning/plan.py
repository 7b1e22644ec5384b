"""Writes a short run description over given sites that fits a time budget.

Streams follow from the images' sizes (stream_proposal.py), the batch from the smallest site. Where the budget holds
only a few rounds of the smallest model, images are read more coarsely. The model's size is the largest one with which
the budget still holds enough rounds. The number of rounds fills the budget, by the time of a step that is tried here.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from panfm.config import RunConfig, SiteConfig, StreamConfig, load_site, parse_run
from panfm.data.manifest import read_manifest
from panfm.data.template import plain_name
from panfm.errors import DataError, LimitError
from panfm.models.sizes import sizes_of
from panfm.planning.cost import Cost, measure_cost
from panfm.planning.image_sizes import Survey, survey_sites
from panfm.planning.shared_tasks import propose_tasks
from panfm.planning.stream_proposal import SIDES, propose_streams
from panfm.site.admission import check_sizes
from panfm.texts import toml_key

_SIZES = ("nano", "tiny", "small", "base")
_ENOUGH_ROUNDS = 100
"""A model grows to the next size only where the budget would hold so many rounds of it."""
_FEW_ROUNDS = 10
"""Fewest rounds of the smallest model; where the minutes hold fewer, images are read more coarsely."""
_MOST_ROUNDS = 200
_LARGEST_BATCH = 32
_MOST_STEP_GIB = 4.0
"""Memory of one step, above which batches are halved."""
_ALONE = 1.5
"""A simulation trains each site once more by itself, two at a time."""
_TIMED_SHARE = 10
"""Of the step that is next in size, at most so many times as slow as the one before, as ViT sizes are."""


@dataclass(frozen=True)
class Plan:
    """A proposed run."""

    text: str
    """TOML."""
    run: RunConfig
    survey: Survey
    cost: Cost
    notes: tuple[str, ...]
    """One line for each thing that a person should know."""


def make_plan(
    folders: Sequence[Path],
    *,
    name: str,
    holdout: Path | None = None,
    minutes: float = 10.0,
    progress: Callable[[int, int], None] = lambda *_: None,
) -> Plan:
    """Propose a run over some sites.

    Args:
        folders: Site folders.
        name: Of the run, and of its file; letters that a name may not have become dashes.
        holdout: Folder of held-out subjects.
        minutes: Time for all rounds and the sites' training alone, on this machine.
        progress: Called with (images surveyed, images in all).
    Raises:
        ConfigError, DataError: a site or the hold-out does not hold.
    """
    if holdout is not None:
        _check_holdout(holdout)
    survey = survey_sites(folders, progress)
    tasks, missing = propose_tasks(folders)
    finest = _Description(folders, plain_name(name) or "run", holdout, propose_streams(survey.streams), survey, tasks)
    trial, told = _fitting_images(finest, minutes)
    size, cost = _fitting_size(trial, minutes)
    rounds = max(1, min(_MOST_ROUNDS, round(_rounds(minutes, cost))))
    text = trial.describe.text(size, {**trial.train, "rounds": rounds})
    run = parse_run(text)
    notes = (*_notes(survey), *told, *_refusals(survey, run), *([missing] if missing else []))
    return Plan(text, run, survey, cost, notes)


def _rounds(minutes: float, cost: Cost) -> float:
    """Rounds that a time budget holds."""
    return 60 * minutes / (_ALONE * cost.round_seconds)


@dataclass(frozen=True)
class _Description:
    """What is settled of a description before its size and its rounds are."""

    folders: Sequence[Path]
    name: str
    holdout: Path | None
    streams: Mapping[str, StreamConfig]
    survey: Survey
    tasks: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Task of the probe of all sites' labels -> its labels."""

    def text(self, size: str, train: Mapping[str, int]) -> str:
        """Write the whole description as TOML, without keys that have their default; rounds always stand there."""
        defaults = RunConfig.model_fields["train"].default
        sites = ",\n".join(f"    {_quoted(folder)}" for folder in self.folders)
        lines = [f'name = "{self.name}"', "", "[cohort]", 'kind = "folder"', f"sites = [\n{sites},\n]"]
        lines += [f"holdout = {_quoted(self.holdout)}"] if self.holdout else []
        lines += ["", "[streams]", *(f"{toml_key(name)} = {_inline(stream)}" for name, stream in self.streams.items())]
        lines += ["", "[model]", f'size = "{size}"'] if size != _SIZES[0] else []
        written = {
            key: value
            for key, value in train.items()
            if key == "rounds" or value != getattr(defaults, key.replace("-", "_"))
        }
        lines += ["", "[train]", *(f"{key} = {value}" for key, value in written.items())] if written else []
        lines += ["", "[federation]", "min-sites = 1"] if len(self.folders) == 1 else []
        tasks = [f"{toml_key(name)} = {json.dumps(labels, ensure_ascii=False)}" for name, labels in self.tasks.items()]
        lines += ["", "[probe.tasks]", *tasks] if tasks else []
        return "\n".join(lines) + "\n"

    def run(self, size: str, train: Mapping[str, int]) -> RunConfig:
        """The description, read back."""
        return parse_run(self.text(size, train))

    def holders(self) -> dict[str, dict[str, float]]:
        """Site -> stream -> share of its subjects who have it."""
        return {
            site: {
                name: min(1.0, stream.by_site[site] / subjects)
                for name, stream in self.survey.streams.items()
                if stream.by_site[site]
            }
            for site, subjects in self.survey.train_subjects.items()
        }


def _fitting_batch(describe: _Description) -> dict[str, int]:
    """Batch size and local steps: as large as the smallest site and the memory allow, as the sites' floors ask."""
    limits = [site.limits for site in describe.survey.sites.values()]
    floor = max(of_site.smallest_batch for of_site in limits)
    steps = max(of_site.smallest_steps for of_site in limits)
    smallest = min(describe.survey.train_subjects.values())
    batch = _LARGEST_BATCH
    while batch > max(1, floor) and (batch > smallest or _step_gib(describe, batch) > _MOST_STEP_GIB):
        batch //= 2
    return {"batch-size": max(batch, floor), "local-steps": max(20, steps)}


def _step_gib(describe: _Description, batch: int) -> float:
    return sizes_of(describe.run(_SIZES[0], {"batch-size": batch})).step_bytes / 2**30


@dataclass(frozen=True)
class _Trial:
    """A description with its batch and steps, and the cost of the smallest model."""

    describe: _Description
    train: Mapping[str, int]
    cost: Cost

    @classmethod
    def of(cls, describe: _Description) -> "_Trial":
        train = _fitting_batch(describe)
        return cls(describe, train, measure_cost(describe.run(_SIZES[0], train), describe.holders()))


def _fitting_images(finest: _Description, minutes: float) -> tuple[_Trial, list[str]]:
    """Try the finest images of which the budget holds enough rounds of the smallest model, or else the coarsest; with
    lines that tell of it."""
    first = trial = _Trial.of(finest)
    for side in SIDES[1:]:
        if _rounds(minutes, trial.cost) >= _FEW_ROUNDS:
            break
        streams = propose_streams(finest.survey.streams, side)
        if streams != trial.describe.streams:
            trial = _Trial.of(replace(finest, streams=streams))
    return trial, [*_coarser(first, trial, minutes), *_too_slow(trial.cost, minutes)]


def _coarser(first: _Trial, trial: _Trial, minutes: float) -> Iterator[str]:
    """Tell which images are read more coarsely than they are."""
    coarse = trial.describe.streams
    changes = [
        f"{name} {_voxels(fine)} -> {_voxels(coarse[name])}"
        for name, fine in first.describe.streams.items()
        if fine != coarse[name]
    ]
    if changes:
        yield (
            f"{minutes:g} minutes hold {_rounds(minutes, first.cost):.2g} rounds at full size: images are read more "
            f"coarsely ({', '.join(changes)} voxels); --minutes {_minutes_for_few(first.cost)} keeps them"
        )


def _too_slow(cost: Cost, minutes: float) -> Iterator[str]:
    if _rounds(minutes, cost) < _FEW_ROUNDS:
        yield (
            f"{minutes:g} minutes hold {_rounds(minutes, cost):.2g} rounds, with the smallest model and the coarsest "
            f"images; --minutes {_minutes_for_few(cost)} holds {_FEW_ROUNDS}"
        )


def _minutes_for_few(cost: Cost) -> int:
    return math.ceil(_FEW_ROUNDS * _ALONE * cost.round_seconds / 60)


def _voxels(stream: StreamConfig) -> str:
    return "x".join(map(str, stream.shape))


def _fitting_size(trial: _Trial, minutes: float) -> tuple[str, Cost]:
    """The largest size with which the budget holds enough rounds; sizes that cannot be are not tried."""
    chosen, cost = _SIZES[0], trial.cost
    for size in _SIZES[1:]:
        if _rounds(minutes, cost) < _ENOUGH_ROUNDS * _TIMED_SHARE / 2:
            break
        run = trial.describe.run(size, trial.train)
        if sizes_of(run).step_bytes / 2**30 > _MOST_STEP_GIB:
            break
        larger = measure_cost(run, trial.describe.holders())
        if _rounds(minutes, larger) < _ENOUGH_ROUNDS:
            break
        chosen, cost = size, larger
    return chosen, cost


def _notes(survey: Survey) -> list[str]:
    notes = [*survey.faults[:3]]
    if len(survey.faults) > len(notes):
        notes.append(f"{len(survey.faults) - len(notes)} more images cannot be read; see `panfm site check`")
    if len(survey.sites) == 1:
        notes.append("one site: federation.min-sites = 1 is written, and nothing is averaged; name more sites for more")
    return notes


def too_few_to_train(site: SiteConfig, subjects: int) -> str:
    """Why a site takes part in no run without privacy; empty if it does."""
    if subjects >= (least := site.limits.smallest_batch):
        return ""
    shortage = f"{subjects} training subjects, fewer than its limits.smallest-batch ({least}): it cannot take part"
    return (
        f"{shortage}; add patients, or, where a folder only stands for a hospital, set smallest-batch = 1 in site.toml"
    )


def _refusals(survey: Survey, run: RunConfig) -> Iterator[str]:
    """One line for each site whose own limits such a run exceeds."""
    for name, site in survey.sites.items():
        if line := too_few_to_train(site, survey.train_subjects.get(name, 0)):
            yield f"site {name}: {line}"
        try:
            check_sizes(run, site.limits)
        except LimitError as error:
            yield f"site {name}: {error}"


def _check_holdout(folder: Path) -> None:
    """Raise DataError if nobody could be tested."""
    if not (folder / "site.toml").is_file():
        remedy = f"`panfm site init {folder} --from FILES --split test` makes one"
        raise DataError(f"{folder}: holds no site.toml, expected a site folder; {remedy}")
    site = load_site(folder)
    if not any(row.split == "test" for row in read_manifest(folder, site)):
        remedy = f"delete it and run `panfm site init {folder} --from FILES --split test`"
        raise DataError(
            f"{folder / site.manifest}: no row in split test, expected the held-out subjects' to be; {remedy}"
        )


def _quoted(folder: Path) -> str:
    """A path as a TOML string, which a JSON string is."""
    return json.dumps(str(folder.resolve()), ensure_ascii=False)


def _inline(stream: StreamConfig) -> str:
    """A stream as a TOML table on one line."""
    parts = [f"spacing-mm = {list(stream.spacing_mm)}"] if stream.spacing_mm else []
    parts += [f"shape = {list(stream.shape)}", f"patch = {list(stream.patch)}"]
    parts += [f"channels = {stream.channels}"] if stream.channels > 1 else []
    return f"{{ {', '.join(parts)} }}"
