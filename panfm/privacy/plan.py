"""Before a private run: what it would cost, and what noise its budget buys."""

from collections.abc import Sequence
from dataclasses import replace

from panfm.config import RunConfig
from panfm.errors import ConfigError
from panfm.privacy.guarantees import NO_CLAIM, claim
from panfm.privacy.ledger import Entry, mechanisms_of
from panfm.privacy.mechanisms import Unit, epsilon, noise_for, planned


def plan(run: RunConfig, entries: Sequence[Entry] = ()) -> list[str]:
    """The lines of `panfm ledger plan`: for patients, for sites, or for both.

    Args:
        entries: A ledger's, whose mechanisms are spent before; of the patients of one site, or of a run's sites.
    Raises:
        ConfigError: the run is not private, or no noise keeps it within its epsilon.
    """
    asked: tuple[tuple[Unit, object], ...] = (("patient", run.privacy), ("site", run.server_privacy))
    units = [unit for unit, table in asked if table]
    if not units:
        raise ConfigError(f"{run.name}: privacy is missing, expected a private run")
    kept_for = entries[0]["unit"] if entries else None
    return [line for unit in units for line in _plan(run, unit, entries if unit == kept_for else ())]


def _plan(run: RunConfig, unit: Unit, entries: Sequence[Entry]) -> list[str]:
    private, table = (run.privacy, "privacy") if unit == "patient" else (run.server_privacy, "server-privacy")
    assert private is not None
    first, *others = (replace(each, count=each.count * run.train.rounds) for each in planned(run, unit))
    before = [*others, *(each for entry in entries for each in mechanisms_of(entry))]
    cost = epsilon([first, *before], private.delta)
    try:
        noise = noise_for(private.epsilon, private.delta, rate=first.rate, count=first.count, others=tuple(before))
    except ValueError as error:
        raise ConfigError(f"{table}.epsilon: {error}") from error
    steps = f" x {run.train.local_steps} steps, sample-rate {first.rate:g}" if unit == "patient" else ", all sites"
    return [
        f"per {unit}: {run.train.rounds} rounds{steps}, delta {private.delta:g}",
        f"noise-multiplier {private.noise_multiplier:g}: epsilon {cost:.3f}",
        f"epsilon {private.epsilon:g}: noise-multiplier {noise:.4g}",
    ]


def cost_of_rounds(run: RunConfig, rounds: int) -> float | None:
    """Epsilon of so many rounds at one site by the run's public description; None where nothing is promised.

    A plan, not a site's account: never more than the run's epsilon, at which every site stops; a round that is repeated
    after a failure costs a site twice, other runs on the same patients count too, and only its own ledger knows.
    """
    if run.privacy is None or claim(run) == NO_CLAIM:
        return None
    spent = epsilon([replace(each, count=each.count * rounds) for each in planned(run)], run.privacy.delta)
    return min(run.privacy.epsilon, spent)
