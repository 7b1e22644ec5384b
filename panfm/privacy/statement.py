"""The cost of privacy in words: a ledger's statement for a data-protection officer, and the plan of a private run."""

import math
from collections.abc import Sequence
from dataclasses import replace

from panfm.config import RunConfig
from panfm.errors import ConfigError
from panfm.hash_chain import Entry
from panfm.privacy.guarantees import NO_CLAIM, claim
from panfm.privacy.ledger import mechanisms_of
from panfm.privacy.mechanisms import Mechanism, Unit, epsilon, planned

_ADVERSARY = (
    "Protected against: the coordinator and its server, even one that chooses the description of every run, the "
    "parameters that a round starts from, and which rounds are asked for again; the other sites; the network; and "
    "whoever reads the models. All of these may work together, and may know the data of every other patient."
)
_VOID_IF = (
    "Void if the same patients also took part in a run without privacy, before or after: what left in such a run has "
    "no noise, and this ledger does not count it. `panfm site log` tells the privacy of all that left. A site with "
    "limits.epsilon, delta and public-subjects in its site.toml refuses such runs."
)
_MOST_NOISE = 1e4
_NOT_COVERED = (
    "runs without privacy, and results that the site publishes itself: probes, embeddings, audits",
    "what is true of patients in general, and can be learned without this one",
    "the site itself, and whoever reads its disk",
    "patients in the validation and test splits, and data a model was pre-trained on before",
    "that the site took part, which streams it holds, and how long it took to answer",
    "attacks on the rounding of floating-point numbers, beyond what panfm/privacy/randomness.py argues",
)
_NOT_COVERED_SITES = (
    "against the server, which sees every site's updates as they are, and whoever reads its memory or its lines",
    "that a site took part, which streams it holds, how long it took to answer, and whether a round failed",
    "other runs over the same sites, which add up and, without such noise, void this; and patients: for them see the "
    "sites' own ledgers",
    "attacks on the rounding of floating-point numbers, beyond what panfm/privacy/randomness.py argues",
)


def statement(entries: Sequence[Entry]) -> list[str]:
    """Lines of `panfm ledger show`: what was promised and spent, on which mechanisms, and what is not covered."""
    if len(entries) < 2:
        return ["No private round has run: nothing is spent."]
    opened, rounds = entries[0], entries[1:]
    if opened["unit"] == "site":
        return _of_sites(rounds)
    lines = [f"Site {opened['site']}: {len(rounds)} private rounds in {len({entry['run'] for entry in rounds})} runs."]
    if any(entry["claim"] == NO_CLAIM for entry in rounds):
        return [*lines, f"{NO_CLAIM}: rounds ran although something broke the guarantee. Nothing is promised."]
    lines += [*_promise(str(opened["site"]), rounds), _ADVERSARY, _VOID_IF]
    if len({entry["dataset"] for entry in rounds}) > 1:
        lines.append(
            "The patients, or which of their images were used, changed between rounds; who joined later or left "
            "earlier spent at most this."
        )
    lines.append("Mechanisms, each a sum over patients with Gaussian noise:")
    lines += _mechanisms(rounds, "patient")
    return [*lines, "Not covered:", *(f"  - {line}" for line in _NOT_COVERED)]


def _of_sites(rounds: Sequence[Entry]) -> list[str]:
    """Statement of a server's ledger."""
    last = rounds[-1]
    sites = str(last["dataset"]).split(",")
    return [
        f"A run over {len(sites)} sites ({', '.join(sites)}): {len(rounds)} rounds with noise for its sites.",
        f"For every one of these sites, the global models of these rounds, and what the run folder says, are "
        f"({_spent(rounds, last['delta']):.3f}, {last['delta']:g})-differentially private under replacing all of the "
        "site's updates by zero, against the other sites and the public, if clipping and noise ran as written here.",
        f"Spent: epsilon {_spent(rounds, last['delta']):.3f} of {last['limit']:g} at delta {last['delta']:g}.",
        "Mechanisms, each a sum over sites with Gaussian noise:",
        *_mechanisms(rounds, "site"),
        "Not covered:",
        *(f"  - {line}" for line in _NOT_COVERED_SITES),
    ]


def _promise(site: str, rounds: Sequence[Entry]) -> list[str]:
    last = rounds[-1]
    spent = _spent(rounds, last["delta"])
    return [
        f"For every patient whose records are at ONE site, all that {site} sent in these rounds, and every model made "
        f"from it, is ({spent:.3f}, {last['delta']:g})-differentially private under adding or removing that patient, "
        "against the server, other sites and the public, if sampling, clipping and noise ran as written here.",
        f"Spent: epsilon {spent:.3f} of {last['limit']:g} at delta {last['delta']:g}. A patient at two such sites: "
        f"epsilon {_spent([*rounds, *rounds], last['delta']):.3f}; at three: "
        f"{_spent([*rounds, *rounds, *rounds], last['delta']):.3f}.",
    ]


def _spent(rounds: Sequence[Entry], delta: float) -> float:
    return epsilon([mechanism for entry in rounds for mechanism in mechanisms_of(entry)], delta)


def _mechanisms(rounds: Sequence[Entry], unit: Unit) -> list[str]:
    counts: dict[tuple[str, str, float, float, float], int] = {}
    for mechanism in (mechanism for entry in rounds for mechanism in mechanisms_of(entry)):
        releases = ", ".join(mechanism.releases)
        key = (mechanism.name, releases, mechanism.sensitivity, mechanism.noise, mechanism.rate)
        counts[key] = counts.get(key, 0) + mechanism.count
    return [
        f"  - {name} (releases {released}): {count} times, sensitivity {sensitivity:.4g}, noise {noise:g} x that, "
        f"each {unit} in it with chance {rate:g}"
        for (name, released, sensitivity, noise, rate), count in counts.items()
    ]


def plan(run: RunConfig, entries: Sequence[Entry] = ()) -> list[str]:
    """Lines of `panfm ledger plan`: the cost of a run, and the noise that its epsilon allows.

    Args:
        entries: Of a ledger, whose mechanisms are spent before; of one site's patients, or of a run's sites.
    Raises:
        ConfigError: the run is not private, or no noise keeps it within its epsilon.
    """
    asked: tuple[tuple[Unit, object], ...] = (("patient", run.patient_dp), ("site", run.site_dp))
    units = [unit for unit, table in asked if table]
    if not units:
        raise ConfigError(f"{run.name}: patient-dp is missing, expected a private run")
    kept_for = entries[0]["unit"] if entries else None
    return [line for unit in units for line in _plan(run, unit, entries if unit == kept_for else ())]


def _plan(run: RunConfig, unit: Unit, entries: Sequence[Entry]) -> list[str]:
    private, table = (run.patient_dp, "patient-dp") if unit == "patient" else (run.site_dp, "site-dp")
    assert private is not None
    first, *others = (replace(mechanism, count=mechanism.count * run.train.rounds) for mechanism in planned(run, unit))
    before = [*others, *(mechanism for entry in entries for mechanism in mechanisms_of(entry))]
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


def noise_for(target: float, delta: float, *, rate: float, count: int, others: tuple[Mechanism, ...] = ()) -> float:
    """Smallest noise, to 0.1 %, with which `count` steps and the other mechanisms stay within epsilon = `target`.

    Raises:
        ValueError: the other mechanisms alone take the target, or no noise up to 10,000 is enough.
    """
    from scipy.optimize import brentq

    def over(noise: float) -> float:
        """Logarithm of the epsilon over the target, which falls almost linearly with that of the noise."""
        spent = epsilon((*others, Mechanism("gradients", (), 1.0, noise, rate, count)), delta)
        return math.log(min(max(spent / target, 1e-9), 1e9))

    high = 1.0
    while over(high) > 0:
        if (high := 2.0 * high) > _MOST_NOISE:
            raise ValueError(
                f"epsilon {target:g}: not reached with noise {_MOST_NOISE:g}; fewer rounds or a larger epsilon"
            )
    low = high / 2.0
    while over(low) <= 0:
        if low <= 0.2:
            return low
        low, high = low / 2.0, low
    noise = math.exp(brentq(lambda exponent: over(math.exp(exponent)), math.log(low), math.log(high), xtol=3e-4))
    while over(noise) > 0:
        noise *= 1.0004
    return noise


def cost_of_rounds(run: RunConfig, rounds: int) -> float | None:
    """Epsilon of so many rounds at one site by the run's public description; None where nothing is promised.

    A plan, not a site's account: never more than the run's epsilon, at which every site stops; a round that is repeated
    after a failure costs a site twice, other runs on the same patients count too, and only its own ledger knows.
    """
    if run.patient_dp is None or claim(run) == NO_CLAIM:
        return None
    cost = epsilon(
        [replace(mechanism, count=mechanism.count * rounds) for mechanism in planned(run)], run.patient_dp.delta
    )
    return min(run.patient_dp.epsilon, cost)
