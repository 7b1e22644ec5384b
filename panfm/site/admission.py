"""Decides which runs a site takes part in: those within the limits of its `site.toml`, as private as it asks, from the
start that the description names.

Parameters that are not finite are refused as well: training from them gives nothing of use, and under privacy a
patient's gradient would be there or not, depending on which parts of the model the patient's images go through.
"""

import math
import time
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from panfm.config import RunConfig, SiteConfig, dump_toml, parse_run
from panfm.config.patient_dp import PatientDpConfig
from panfm.config.site_description import LimitsConfig
from panfm.config.streams import StreamConfig
from panfm.config.task import TaskConfig
from panfm.config.training import TrainConfig
from panfm.errors import ConfigError, LimitError, ProtocolError
from panfm.models import build_model
from panfm.models.packing import shared_hashes
from panfm.models.sizes import sizes_of, tokens_per_patient
from panfm.privacy.guarantees import NO_CLAIM, broken_guarantees, claim
from panfm.sharing.groups import Flat, parameter_hashes
from panfm.sharing.messages import frozen_name
from panfm.site.state import RUNS, active_runs, is_ended, read_asked

_SEEDED = f"the run's seed gives with torch {torch.__version__}; another torch at the server may draw others"


def admit(run: RunConfig, site: SiteConfig) -> RunConfig:
    """Check a run's description against the site's limits; returns it with the site's public number of patients.

    Raises:
        LimitError, ProtocolError: the site takes no part in such a run.
        ConfigError: the site's public number of patients breaks the run's guarantee.
    """
    limits = site.limits
    check_labels(run.task, limits)
    check_sizes(run, limits)
    check_privacy(run := with_public_subjects(run, site), site)
    check_public_cache(run.streams, run.patient_dp, limits)
    check_floors(run.train, run.patient_dp, limits)
    if limits.devices > 1:
        from panfm.training.spread import check_spread  # a site with one device does without

        check_spread(run, limits.devices)
    return run


def check_labels(task: TaskConfig | None, limits: LimitsConfig) -> None:
    """Raises LimitError if a run trains on a label that the site's operator has not named."""
    if task is not None and limits.training_labels != "all" and task.label not in limits.training_labels:
        raise LimitError.of_question(
            f"task.label: this site's limits.training-labels lacks {task.label!r}, its operator may add it"
        )


def check_privacy(run: RunConfig, site: SiteConfig) -> None:
    """Check that a run is as private as the site's limits ask.

    A private run without a claim voids the ledger of all later ones, so only a site with `smallest-batch = 1` takes
    part in it.

    Raises:
        ProtocolError: it is less private.
        LimitError: it adds noise but makes no privacy claim, and the site's `smallest-batch` is above 1.
    """
    if site.limits.epsilon is None:
        if claim(run) == NO_CLAIM and site.limits.smallest_batch > 1:
            raise LimitError(
                "patient-dp: this run has noise but makes no claim, which would void this site's ledger, expected one"
            )
        return
    if run.patient_dp is None or run.patient_dp.acknowledge_broken_guarantee or claim(run) == NO_CLAIM:
        raise ProtocolError("this site's limits.epsilon allows private runs only, with their guarantee whole")


def with_public_subjects(run: RunConfig, site: SiteConfig) -> RunConfig:
    """Replace a private run's public number of patients by the site's own, if the site names one.

    Raises:
        ConfigError: with that number the run's guarantee does not hold.
    """
    if run.patient_dp is None or site.limits.public_subjects is None:
        return run
    private = run.patient_dp.model_copy(update={"public_subjects": site.limits.public_subjects})
    local = run.model_copy(update={"patient_dp": private})
    if claim(run) != NO_CLAIM:
        for fault in broken_guarantees(local):
            raise ConfigError(f"limits.public-subjects: {site.limits.public_subjects} patients: {fault}")
    return local


def check_sizes(run: RunConfig, limits: LimitsConfig) -> None:
    """Refuse a run that is too large, before anything is built or allocated for it.

    Raises:
        LimitError: names the limit, its value, and the run's value.
    """
    image = max(stream.channels * math.prod(stream.shape) for stream in run.streams.values())
    _check("voxels-per-image", image, limits.voxels_per_image)
    _check("tokens-per-patient", tokens_per_patient(run.streams), limits.tokens_per_patient)
    sizes = sizes_of(run)
    _check("parameters", sizes.parameters, limits.parameters)
    _check("local-steps", run.train.local_steps, limits.local_steps)
    _check("rounds", run.train.rounds, limits.rounds)
    _check("step-gib", max(sizes.step_bytes, sizes.probe_bytes) / 2**30, limits.step_gib)
    _check("state-gib", sizes.kept_bytes / 2**30, limits.state_gib)


def check_public_cache(
    streams: Mapping[str, StreamConfig], patient_dp: PatientDpConfig | None, limits: LimitsConfig
) -> None:
    """Raises LimitError if the prepared images of the site's public number of patients would have no room.

    Of a private run at a site with such a number, this refuses before anything of the true number is looked at.
    """
    if patient_dp is None or limits.public_subjects is None:
        return
    numbers = sum(stream.channels * math.prod(stream.shape) for stream in streams.values())
    size = 4 * numbers * limits.public_subjects / 2**30
    if size > limits.cache_gib:
        raise LimitError.of_question(
            f"images of public-subjects with every stream would fill {size:.6g} GiB, this site's limits.cache-gib is "
            f"{limits.cache_gib:g}"
        )


def _check(name: str, value: float, limit: float) -> None:
    """Raises LimitError if a number that the run's description alone decides is above a limit."""
    if value > limit:
        raise LimitError.of_question(f"this run asks for {value:.12g}, this site's limits.{name} is {limit:.12g}")


def check_floors(train: TrainConfig, patient_dp: PatientDpConfig | None, limits: LimitsConfig) -> None:
    """Raises LimitError if a run asks for smaller batches or fewer steps than the site allows.

    A private run takes part where the site bounds epsilon itself: its own noise and clipping then stand in the floors'
    place. Any other is refused where there is a floor, since an epsilon, a delta or a number of patients that the
    server chose promises nothing, and a step of it may be one patient's.
    """
    if patient_dp is not None:
        if limits.epsilon is None and max(limits.smallest_batch, limits.smallest_steps) > 1:
            raise LimitError.of_question(
                "patient-dp: a private run takes part under the site's own bound only, expected limits.epsilon, delta "
                "and public-subjects in site.toml"
            )
        return
    if (batch := train.batch_size) < limits.smallest_batch:
        raise LimitError.of_question(
            f"train.batch-size is {batch}, expected at least limits.smallest-batch ({limits.smallest_batch})"
        )
    if train.local_steps < limits.smallest_steps:
        raise LimitError.of_question(
            f"train.local-steps is {train.local_steps}, expected at least "
            f"limits.smallest-steps ({limits.smallest_steps})"
        )


def check_other_runs(state_dir: Path, run_id: str, limits: LimitsConfig) -> None:
    """Raises LimitError if this run was ended here, or other runs that go on are as many as the site allows."""
    folder = state_dir / RUNS / run_id
    if is_ended(folder):
        raise LimitError.of_question(f"run {run_id}: the operator of this site has ended it")
    if (known := read_asked(folder)) and known.is_finished:  # it can only ask for its last round again, or for sums
        return
    active = {name: asked for name, asked in active_runs(state_dir, limits).items() if name != run_id}
    if len(active) >= limits.runs_at_once:
        name, asked = max(active.items(), key=lambda entry: entry[1].newest)
        since = time.strftime("%Y-%m-%d %H:%M", time.localtime(asked.newest))
        rule = f"limits.runs-at-once is {limits.runs_at_once}; this site's operator can end it: panfm site end"
        raise LimitError(
            f"run {name} is not finished, last asked {since}, {rule}", public=f"another run is not finished, {rule}"
        )


def check_finite(
    round_number: int, groups: Mapping[str, Flat], teacher: Mapping[str, Flat], profile: Mapping[str, float] | None
) -> None:
    """Raise ProtocolError if a number that the server sent for a round is not finite.

    Args:
        groups: Global parameters, coded steps taken.
        teacher: The server's average of them; empty if it sends none.
        profile: Saliency by stream.
    """
    for kind, arrays in (("global parameters", groups), ("teacher", teacher)):
        for group, array in arrays.items():
            if not bool(np.isfinite(array).all()):
                raise ProtocolError(f"round {round_number}: {kind} of group {group} hold NaN or infinity")
    for stream, value in (profile or {}).items():
        if not math.isfinite(value):
            raise ProtocolError(
                f"round {round_number}: saliency of stream {stream} is {value}, expected a finite number"
            )


def check_start(run: RunConfig, streams: Sequence[str], groups: Mapping[str, Flat]) -> None:
    """Check the global parameters of round 1 against the run's description.

    Args:
        streams: Those that this site trains.
    Raises:
        ProtocolError: they are not what `start.parameters` names or, without a start, the seed gives.
    """
    expected, source = _start_hashes(run, streams)
    _compare(1, parameter_hashes(groups), expected, source)


def check_frozen(run: RunConfig, streams: Sequence[str], round_number: int, frozen: Mapping[str, Flat]) -> None:
    """Check the parameters that a run does not train against its description, in whichever round they come.

    Args:
        streams: Those that this site trains.
        frozen: Group -> its parameters that are not trained.
    Raises:
        ProtocolError: they are not what `start.parameters` names or, without a start, the seed gives.
    """
    expected, source = _start_hashes(run, streams)
    hashes = {frozen_name(group): digest for group, digest in parameter_hashes(frozen).items()}
    _compare(round_number, hashes, expected, source)


def _start_hashes(run: RunConfig, streams: Sequence[str]) -> tuple[Mapping[str, str], str]:
    """Expected hashes of what a run starts from, and where they come from."""
    if run.start is not None and run.start.parameters is None:
        raise ProtocolError("start.parameters: missing, expected the hashes that the server's run.toml has")
    if run.start is not None and run.start.parameters is not None:
        return run.start.parameters, "start.parameters names"
    return _seeded_hashes(dump_toml(run), tuple(streams)), _SEEDED


def _compare(round_number: int, hashes: Mapping[str, str], expected: Mapping[str, str], source: str) -> None:
    for group, digest in sorted(hashes.items()):
        if digest != expected.get(group):
            raise ProtocolError(f"round {round_number}: {group} is not what {source}")


@lru_cache(maxsize=32)
def _seeded_hashes(run_toml: str, streams: tuple[str, ...]) -> dict[str, str]:
    """Hashes of the shared parameters that a run's seed gives."""
    run = parse_run(run_toml)
    model = build_model(run, streams)
    return shared_hashes(model, run.sharing, {name: value.detach() for name, value in model.state_dict().items()})
