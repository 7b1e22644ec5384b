"""Monitors of a round by site, and the words for those that have gone wrong.

What a site may send is in panfm/training/monitors.py; `saliency-entropy` is computed here, from the saliency that it
sends: 1 when the model leans on all of the site's streams alike, 0 when on one alone.

    features collapse     effective rank below 2: what the model says of patients lies close to a line
    features fade         feature deviation below .01: it says the same of all
    teacher is blank      teacher entropy above .999: a `dino` teacher prefers nothing
    one stream has all    saliency entropy below .1
    one expert has all    fewer than 1.05 of two or more experts in use

A word is a hint, not a proof: a batch of a site with one organ varies less than one with seven.
"""

from collections.abc import Mapping
from typing import Any

from panfm.config import RunConfig
from panfm.evaluate.representation import saliency_entropy
from panfm.models.pan import SIZES
from panfm.report.run_events import EventKind
from panfm.sharing.messages import RoundReply
from server.events import EventLog

_LEAST_RANK = 2.0
_LEAST_DEVIATION = 0.01
_MOST_TEACHER_ENTROPY = 0.999
_LEAST_SALIENCY_ENTROPY = 0.1
_LEAST_EXPERTS = 1.05
FAULTS = {
    "effective-rank": "features collapse",
    "feature-deviation": "features are nearly the same for all patients",
    "teacher-entropy": "the teacher prefers nothing",
    "saliency-entropy": "the model leans on one stream",
    "experts-used": "one expert gets all images",
}
"""Monitor -> words for it when it goes wrong."""


def site_monitors(reply: RoundReply) -> dict[str, float]:
    """Monitors that a site has sent, and the entropy of its saliency where it has told of two streams or more."""
    shares = list(reply.saliency.values())
    told = {"saliency-entropy": saliency_entropy(shares)} if len(shares) > 1 and sum(shares) > 0 else {}
    return {**reply.monitors, **told}


def faults(run: RunConfig, round_number: int, replies: Mapping[str, RoundReply]) -> dict[str, dict[str, str]]:
    """Site -> monitor that has gone wrong -> a line that says so; sites without any are left out."""
    by_site = {
        site: {
            name: f"{FAULTS[name]} at {site}: {name.replace('-', ' ')} {value:.3g}{most} in round {round_number}"
            for name, value in site_monitors(reply).items()
            if name in FAULTS
            if _is_wrong(run, name, value)
            for most in [_most(run, name)]
        }
        for site, reply in replies.items()
    }
    return {site: words for site, words in by_site.items() if words}


def note_monitors(line: Mapping[str, Any], events: EventLog) -> None:
    """Note which monitors have gone wrong or have recovered, of the sites in a line of rounds.jsonl."""
    for site, reply in line["sites"].items():
        wrong = line["faults"].get(site, {})
        for name, value in reply["monitors"].items():
            words = wrong.get(name) or f"recovered at {site}: {name.replace('-', ' ')} {value:.3g}"
            events.note_level(EventKind.MONITOR, "wrong" if name in wrong else None, words, of=name, site=site)


def _is_wrong(run: RunConfig, name: str, value: float) -> bool:
    return {
        "effective-rank": value < _LEAST_RANK,
        "feature-deviation": value < _LEAST_DEVIATION,
        "teacher-entropy": value > _MOST_TEACHER_ENTROPY,
        "saliency-entropy": value < _LEAST_SALIENCY_ENTROPY,
        "experts-used": value < _LEAST_EXPERTS and max(run.model.experts.count) > 1,
    }[name]


def _most(run: RunConfig, name: str) -> str:
    """` of 48` for a rank, ` of 4` for experts: what it could be; nothing for a share."""
    most = {"effective-rank": SIZES[run.model.size][0], "experts-used": max(run.model.experts.count)}.get(name)
    return "" if most is None else f" of {most}"
