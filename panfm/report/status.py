"""The state of a run for people who watch it: by site, by stream, who was left out. Read from the run folder alone."""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from panfm.privacy.guarantees import privacy_label
from panfm.report.run_files import Run

_RECENT = 5
"""Rounds whose median length tells how long the rest will take."""


@dataclass(frozen=True)
class SiteStatus:
    """One site, or a node that would not give a site's name."""

    site: str
    subjects: int | None
    asked: int
    """Rounds in which it was asked."""
    answered: int
    """Rounds in which its reply was taken."""
    seconds: float | None
    """Until its last reply."""
    loss: float | None
    """Its last training loss, if it tells."""
    epsilon: float | None
    """Planned privacy cost of the rounds in which it was asked, never more than was promised; None: not private."""
    now: str
    """What became of it in the last round."""


@dataclass(frozen=True)
class StreamStatus:
    """One stream."""

    stream: str
    holders: tuple[str, ...]
    """Sites that hold it."""
    trained_by: tuple[str, ...]
    """Sites whose replies moved it in the last round."""
    last_round: int | None
    """The last round that moved it."""
    saliency: float | None
    """Of the federation, in shares of an equal split."""


def site_statuses(run: Run) -> list[SiteStatus]:
    """All sites, and nodes that ask to join, by name."""
    last = _last_line(run)
    names = dict.fromkeys([*run.site_names, *last.get("away", {}), *last.get("rejected", {})])
    return [_site_status(run, site, last) for site in sorted(names)]


def _last_line(run: Run) -> Mapping[str, Any]:
    """Line of the last round, also if it did not count; empty before the first."""
    return run.uncounted or (run.rounds[-1] if run.rounds else {})


def stream_statuses(run: Run) -> list[StreamStatus]:
    """All streams, as the run describes them."""
    last = run.rounds[-1] if run.rounds else {}
    profile: Mapping[str, float] = next((line["profile"] for line in reversed(run.rounds) if line.get("profile")), {})
    return [
        StreamStatus(
            stream,
            tuple(site for site, holdings in run.sites.items() if stream in holdings["streams"]),
            tuple(last.get("coverage", {}).get(stream, ())),
            next((line["round"] for line in reversed(run.rounds) if stream in line.get("coverage", {})), None),
            profile.get(stream),
        )
        for stream in run.config.streams
    ]


def left_out(run: Run, most: int = 30) -> list[tuple[str, str, str]]:
    """Sites that were left out or moved to another node: in which rounds and why, the latest first."""
    rounds: dict[tuple[str, str], list[int]] = {}
    for line in [*run.rounds, *([run.uncounted] if run.uncounted else [])]:
        for site, reason in (item for key in ("rejected", "away", "moved") for item in line.get(key, {}).items()):
            rounds.setdefault((site, reason), []).append(line["round"])
    latest = sorted(rounds.items(), key=lambda entry: entry[1][-1], reverse=True)[:most]
    reasons = [(site, ranges(numbers), reason) for (site, reason), numbers in latest]
    return reasons + [("", "the start", reason) for reason in run.left_out]


def history(run: Run, most: int = 30) -> list[tuple[str, str, str, str, str]]:
    """Last events of a run, the latest first: local time, round, kind, site, words."""
    return [
        (
            datetime.fromisoformat(event.time).astimezone().isoformat(sep=" ", timespec="seconds"),
            str(event.round),
            event.kind.value,
            event.site or "",
            event.words,
        )
        for event in run.events[: -most - 1 : -1]
    ]


def headline(run: Run) -> str:
    """Rounds done, state and time left of a run, in one line."""
    done, total = len(run.rounds), run.config.train.rounds
    words = f"{done} of {total} rounds, {run.state}"
    if run.failure and run.state == run.ending:
        return f"{words}: {run.failure}"
    lengths = [line["seconds"] for line in run.rounds[-_RECENT:] if line.get("seconds") is not None]
    if run.state == "running" and lengths:
        usual = statistics.median(lengths)
        return f"{words}; {clock(usual)} a round, about {clock(usual * (total - done))} left"
    return words


def privacy_line(run: Run) -> str:
    """The privacy that is promised to patients and sites; empty if none is."""
    promised = privacy_label(run.config)
    return "" if promised == "none" else f"privacy: {promised}; epsilon below is the plan's, each ledger decides"


def gate_line(run: Run) -> str:
    """Which rounds a run with a gate has kept, and the measure of the start and of the model that is kept; empty
    without a gate."""
    gates = {line["round"]: line["gate"] for line in run.rounds if line.get("gate")}
    if not gates:
        return ""
    kept = [number for number, gate in gates.items() if gate["kept"]]
    first, last = next(iter(gates.values())), list(gates.values())[-1]
    now = last["measure"] if last["kept"] else last["before"]
    words = f"{ranges(kept)} kept" if kept else "no round kept"
    return f"gate: {words} of {len(gates)}; measure {first['before']:.4f} at the start, {now:.4f} now"


def ranges(numbers: Sequence[int]) -> str:
    """`rounds 1-3, 7` for 1, 2, 3, 7, in ascending order."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    words = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
    return f"round{'s' if len(numbers) > 1 else ''} {words}"


def number(value: float | None, digits: int) -> str:
    """A number with so many digits; a dash where there is none."""
    return "-" if value is None else f"{value:.{digits}f}"


def clock(seconds: float) -> str:
    """A length of time, in two units at most."""
    if seconds < 100:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def _site_status(run: Run, site: str, last: Mapping[str, Any]) -> SiteStatus:
    replies = [line["sites"][site] for line in run.rounds if site in line.get("sites", {})]
    costs = [cost for line in run.rounds if (cost := line.get("epsilon", {}).get(site)) is not None]
    return SiteStatus(
        site,
        run.sites.get(site, {}).get("subjects"),
        sum(site in line.get("asked", ()) for line in run.rounds),
        len(replies),
        next((reply["seconds"] for reply in reversed(replies) if reply.get("seconds") is not None), None),
        next((reply["loss"] for reply in reversed(replies) if reply.get("loss") is not None), None),
        costs[-1] if costs else None,
        _now(site, last),
    )


def _now(site: str, last: Mapping[str, Any]) -> str:
    if not last:
        return "shook hands"
    if reason := last.get("rejected", {}).get(site):
        return f"left out: {reason}"
    if site in last.get("sites", {}):
        return "answered"
    return last.get("away", {}).get(site) or "not asked"


def series(run: Run, key: str) -> Iterator[tuple[int, float]]:
    """A number of the whole federation, by round, where there is one."""
    for line in run.rounds:
        if line.get(key) is not None:
            yield line["round"], line[key]
