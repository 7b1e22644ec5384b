"""What a ledger says, in words that a data-protection officer can read."""

from collections.abc import Sequence

from panfm.privacy.guarantees import NO_CLAIM
from panfm.privacy.ledger import Entry, mechanisms_of
from panfm.privacy.mechanisms import Unit, epsilon

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
    """The lines of `panfm ledger show`."""
    if len(entries) < 2:
        return ["No private round has run: nothing is spent."]
    opened, rounds = entries[0], entries[1:]
    if opened["unit"] == "site":
        return _of_sites(rounds)
    lines = [f"Site {opened['site']}: {len(rounds)} private rounds in {len({each['run'] for each in rounds})} runs."]
    if any(each["claim"] == NO_CLAIM for each in rounds):
        return [*lines, f"{NO_CLAIM}: rounds ran although something broke the guarantee. Nothing is promised."]
    lines += [*_promise(str(opened["site"]), rounds), _ADVERSARY, _VOID_IF]
    if len({each["dataset"] for each in rounds}) > 1:
        lines.append(
            "The patients, or which of their images were used, changed between rounds; who joined later or left "
            "earlier spent at most this."
        )
    lines.append("Mechanisms, each a sum over patients with Gaussian noise:")
    lines += _mechanisms(rounds, "patient")
    return [*lines, "Not covered:", *(f"  - {each}" for each in _NOT_COVERED)]


def _of_sites(rounds: Sequence[Entry]) -> list[str]:
    """A server's ledger."""
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
        *(f"  - {each}" for each in _NOT_COVERED_SITES),
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
    return epsilon([each for entry in rounds for each in mechanisms_of(entry)], delta)


def _mechanisms(rounds: Sequence[Entry], unit: Unit) -> list[str]:
    counts: dict[tuple[str, str, float, float, float], int] = {}
    for each in (mechanism for entry in rounds for mechanism in mechanisms_of(entry)):
        key = (each.name, ", ".join(each.releases), each.sensitivity, each.noise, each.rate)
        counts[key] = counts.get(key, 0) + each.count
    return [
        f"  - {name} (releases {released}): {count} times, sensitivity {sensitivity:.4g}, noise {noise:g} x that, "
        f"each {unit} in it with chance {rate:g}"
        for (name, released, sensitivity, noise, rate), count in counts.items()
    ]
