"""Which privacy a run may claim, and what would break the claim.

`checked_run` or `load_checked_run` is called wherever a run description comes in: before a run folder is made or
resumed, when a site is asked, in a dry run, and when a trainer is built.

Patient-level privacy (`[patient-dp]`): add or remove one patient of one site. Site-level privacy (`[site-dp]`): the
updates of one site as they are, or all zero.
"""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from panfm.config import RunConfig
from panfm.config.base import LEAST_NOISE, Config
from panfm.config.objective import ObjectiveConfig
from panfm.errors import ConfigError

NO_CLAIM = "noise only, no DP claim"
"""Label on every artefact of a run that trains on although its guarantee is broken."""
_LARGEST_DELTA = 0.01


def load_checked_run(path: Path, overrides: Iterable[str] = ()) -> RunConfig:
    """Read a run description as `panfm.config.load_run` does, and check it as `checked_run` does.

    Torch is imported last, and only for a run with patient-level privacy: its backbone says what couples patients.
    """
    from panfm.config import load_run  # a worker is sent the text

    return checked_run(load_run(path, overrides), str(path))


def checked_run(run: RunConfig, where: str = "run description") -> RunConfig:
    """Return the run if it can keep the privacy that it promises. Raises ConfigError, naming the first fault, if not.

    Args:
        where: The file or message that described the run, for the error.
    """
    for fault in _faults(run):
        raise ConfigError(f"{where}: {fault}")
    return run


def claim(run: RunConfig) -> str | None:
    """Claim that a run may make about its patients' privacy; None if it is not private."""
    if run.patient_dp is None:
        return None
    if any(broken_guarantees(run)) or run.train.proximal_mu:
        return NO_CLAIM
    return f"({run.patient_dp.epsilon:g}, {run.patient_dp.delta:g})-DP per patient of one site, add-or-remove-one"


def site_dp_claim(run: RunConfig) -> str | None:
    """Claim that a run may make about its sites' privacy; None without site-level privacy."""
    if run.site_dp is None:
        return None
    from panfm.privacy.site_dp_faults import site_dp_faults  # of no use to other runs

    if any(site_dp_faults(run)):
        return NO_CLAIM
    private = run.site_dp
    return f"({private.epsilon:g}, {private.delta:g})-DP per site, zero-out, server trusted"


def privacy_label(run: RunConfig) -> str:
    """Label of a run's privacy, which every artefact of the run carries."""
    return "; ".join(filter(None, (claim(run), site_dp_claim(run)))) or "none"


def broken_guarantees(run: RunConfig) -> Iterator[str]:
    """List what breaks the patient-level guarantee of a private run, one line each.

    A patient's gradient, or an output, that depends on other patients; a table of the run that does not declare whether
    anything in it does; numbers that leave too little to promise.
    """
    assert run.patient_dp is not None
    private = run.patient_dp
    largest = min(0.1 / private.public_subjects, _LARGEST_DELTA)
    if private.delta > largest:
        rule = "1 / (10 public-subjects)" if largest < _LARGEST_DELTA else f"{_LARGEST_DELTA:g}"
        yield f"patient-dp.delta: {private.delta:g} is above {rule}, set at most {largest:.3g}"
    noises = {"noise-multiplier": private.noise_multiplier, "statistics-noise": private.statistics_noise}
    for key, noise in noises.items():
        if noise < LEAST_NOISE:
            yield f"patient-dp.{key}: {noise:g} protects nobody, set at least {LEAST_NOISE}"
    for key, table in sorted(_tables(run), key=lambda item: item[0] == "model"):  # asking a backbone imports torch
        yield from _couplings(table, key)


def _faults(run: RunConfig) -> Iterator[str]:
    """All faults for which a run is refused."""
    if run.patient_dp and run.train.proximal_mu:
        yield "train.proximal-mu: not done in private runs, set 0"
    if run.patient_dp and not run.patient_dp.acknowledge_broken_guarantee:
        yield from broken_guarantees(run)
    if run.site_dp:
        from panfm.privacy.site_dp_faults import site_dp_faults

        yield from site_dp_faults(run)


def _tables(run: RunConfig) -> Iterator[tuple[str, Config]]:
    """Every table of a run, by its dotted key; a table declares for the tables within it."""
    for name in type(run).model_fields:
        key, value = name.replace("_", "-"), getattr(run, name)
        if isinstance(value, Config):
            yield key, value
        elif isinstance(value, Mapping):
            yield from ((f"{key}.{inner}", table) for inner, table in value.items() if isinstance(table, Config))


def _couplings(table: Config, key: str) -> Iterator[str]:
    """The couplings of patients that a table of the run declares."""
    declared = getattr(table, "couplings", None)
    if declared is None or (isinstance(table, ObjectiveConfig) and "couplings" not in vars(type(table))):
        name = getattr(table, "name", type(table).__name__)
        yield f'{key}: "{name}" does not declare whether it couples patients, set one that does'
        return
    for line in declared():
        yield f"{key}.{line}"
