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
from panfm.config.patient_dp import PatientDpConfig
from panfm.errors import ConfigError
from panfm.texts import toml_key

NO_CLAIM = "noise only, no DP claim"
"""Label on every artefact of a run that trains on although its guarantee is broken."""
_LARGEST_DELTA = 0.01
_NO_PROXIMAL_STEP = "train.proximal-mu: not done in private runs, set 0"


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
        yield f"patient-dp.delta: {private.delta:g} is above {_delta_rule(private)}, set at most {largest:.3g}"
    noises = {"noise-multiplier": private.noise_multiplier, "statistics-noise": private.statistics_noise}
    for key, noise in noises.items():
        if noise < LEAST_NOISE:
            yield f"patient-dp.{key}: {noise:g} protects nobody, set at least {LEAST_NOISE}"
    for key, table in sorted(_tables(run), key=lambda item: item[0] == "model"):  # asking a backbone imports torch
        yield from _couplings(table, key)


def site_dp_faults(run: RunConfig) -> Iterator[str]:
    """List what would show a site by more than its clipped and noised update, one line each."""
    assert run.site_dp is not None
    private, sharing = run.site_dp, run.sharing
    largest = 0.1 / private.num_sites
    if private.delta > largest:
        yield f"site-dp.delta: {private.delta:g} is above 1 / (10 num-sites), set at most {largest:.3g}"
    if private.num_sites != run.federation.min_sites:
        yield f"federation.min-sites: no round is released without all sites, set {private.num_sites}, as num-sites"
    means = {"sharing.mean": sharing.mean}
    means |= {f"sharing.groups.{name}.mean": group.mean for name, group in sharing.groups.items() if group.mean}
    for key, mean in means.items():
        if mean != "weighted":
            yield f'{key}: "{mean}" has no sensitivity of clip-norm / num-sites, set "weighted"'
    if sharing.experts == "pooled":
        yield 'sharing.experts: "pooled" weighs sites by their patients\' gates, set "private" or "naive"'
    if sharing.guards.direction is not None:
        yield "sharing.guards.direction: refuses sites by what their updates say, leave it out"
    if run.features.whitening:
        yield "features.whitening: is fitted from the sites' images without noise, set false"
    if run.probe.tasks:
        yield "probe.tasks: labels are summed at the sites without noise, leave it out"
    for name, stream in run.streams.items():
        yield from (f"{toml_key('streams', name)}.{line}" for line in stream.couplings())
    if run.gate:
        yield "gate.measure: is summed at the sites without noise, leave the table out"
    if run.federation.participation < 1.0:
        yield "federation.participation: the mean is over all sites in every round, set 1.0"
    if run.masking.steered_by == "federation":
        yield 'masking.scope: "federation" tells the mean of the sites\' saliency, set "site" or "subject"'


def _faults(run: RunConfig) -> Iterator[str]:
    """All faults for which a run is refused."""
    if run.patient_dp and run.train.proximal_mu:
        yield _NO_PROXIMAL_STEP
    if run.patient_dp and not run.patient_dp.acknowledge_broken_guarantee:
        yield from broken_guarantees(run)
    if run.site_dp:
        yield from site_dp_faults(run)


def _delta_rule(private: PatientDpConfig) -> str:
    return "1 / (10 public-subjects)" if 0.1 / private.public_subjects < _LARGEST_DELTA else f"{_LARGEST_DELTA:g}"


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
