"""One page for those who watch a run without a shell: `status.html`, written anew after every round.

It opens without a network and asks the browser to load it again while the run goes on. A server at work writes it at
least once a minute; a page that is older says so by itself. Its words come from sites too: all are escaped, and it
forbids any script but its own, by the hash.
"""

import base64
import hashlib
import html
import time
from pathlib import Path

from panfm.config import experiment_hash
from panfm.files import write_atomic
from panfm.report.charts import Points
from panfm.report.html_parts import STYLE, chart, section, table
from panfm.report.run_files import Run, read_run
from panfm.report.status import (
    clock,
    gate_line,
    headline,
    history,
    left_out,
    number,
    privacy_line,
    series,
    site_statuses,
    stream_statuses,
)

_REFRESH_S = 15
WRITTEN_EVERY_S = 60
"""A server at work writes the page at least as often."""
_DUE_S = 3 * WRITTEN_EVERY_S
_SCRIPT = (
    "const age = document.getElementById('age');"
    "const check = () => { if (Date.now() / 1000 > Number(age.dataset.due))"
    " { age.textContent = age.dataset.stale; age.className = 'stale'; } };"
    "check(); setInterval(check, 5000);"
)
_MORE_STYLE = """
progress { width: 100%; height: 1rem }
h2 { margin-top: 1.6rem }
.stale { font-weight: 700; border: 2px solid currentColor; padding: .3rem .6rem }
body > svg { display: block; width: 100%; max-width: 26rem }
table { display: block; overflow-x: auto }
:is(td, th):not(:first-child, :last-child) { text-align: right }
"""


def write_status(folder: Path) -> Path:
    """Write `status.html` into a run folder and return its path. Raises as `read_run`, and OSError."""
    path = folder / "status.html"
    write_atomic(path, render_status(read_run(folder)).encode())
    return path


def render_status(run: Run) -> str:
    """The whole page."""
    name = html.escape(run.config.name)
    refresh = f'<meta http-equiv="refresh" content="{_REFRESH_S}">' if run.state == "running" else ""
    digest = base64.b64encode(hashlib.sha256(_SCRIPT.encode()).digest()).decode()
    guard = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    total, done = run.config.train.rounds, len(run.rounds)
    notes = " ".join(filter(None, (privacy_line(run), gate_line(run))))
    now = "".join(f"<p>{html.escape(line)}</p>" for line in (run.progress.lines() if run.progress else ()))
    sections = [
        section(
            "Sites", table(("site", "subjects", "rounds", "seconds", "loss", "epsilon", "last round"), _sites(run))
        ),
        section(
            "Streams", table(("stream", "held by", "trained by", "last round", "saliency", "sites"), _streams(run))
        ),
        section("Left out, and why", _left_out(run)),
        section("History", _history(run)),
        *(section(title, chart) for title, chart in _charts(run).items()),
        section("Run", table(("what", ""), _facts(run).items())),
    ]
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8">{refresh}'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{guard}"><title>{name}</title>'
        f"<style>{STYLE}{_MORE_STYLE}</style></head><body><h1>{name}</h1><p>{html.escape(headline(run))}</p>"
        f'<progress max="{total}" value="{done}"></progress>'
        f'{_age(run)}<p class="quiet">{html.escape(notes)}</p>{now}{"".join(sections)}</body></html>\n'
    )


def _age(run: Run) -> str:
    """When the page was written; while the run goes on also when a new one is due, and a script that tells of it."""
    now = time.time()
    told, due = (time.strftime("%Y-%m-%d %H:%M:%S %Z", time.localtime(at)) for at in (now, now + _DUE_S))
    if run.state != "running":
        return f'<p class="quiet">as of {told}.</p>'
    stale = f"Last heard of at {told}, stale: the server writes this page every minute and has not since."
    words = f"as of {told}; a new page is due by {due}."
    return (
        f'<p id="age" class="quiet" data-due="{now + _DUE_S:.0f}" data-stale="{html.escape(stale)}">'
        f"{html.escape(words)}</p><script>{_SCRIPT}</script>"
    )


def _sites(run: Run) -> list[tuple[str, ...]]:
    return [
        (
            status.site,
            "-" if status.subjects is None else str(status.subjects),
            f"{status.answered} of {status.asked}",
            "-" if status.seconds is None else clock(status.seconds),
            number(status.loss, 4),
            number(status.epsilon, 3),
            status.now,
        )
        for status in site_statuses(run)
    ]


def _streams(run: Run) -> list[tuple[str, ...]]:
    return [
        (
            status.stream,
            str(len(status.holders)),
            str(len(status.trained_by)),
            "-" if status.last_round is None else str(status.last_round),
            number(status.saliency, 2),
            ", ".join(status.holders),
        )
        for status in stream_statuses(run)
    ]


def _left_out(run: Run) -> str:
    rows = left_out(run)
    return table(("site", "when", "why"), rows) if rows else '<p class="quiet">Nobody.</p>'


def _history(run: Run) -> str:
    rows = history(run)
    return table(("time", "round", "event", "site", "what"), rows) if rows else ""


def _charts(run: Run) -> dict[str, str]:
    """Title -> chart; empty where there is nothing to draw."""
    losses: dict[str, Points] = {"federation": list(series(run, "loss"))}
    losses |= {site: list(zip(*run.series(site, "loss"), strict=True)) for site in run.site_names}
    streams = run.config.streams
    told = [(line["round"], line["profile"]) for line in run.rounds if line.get("profile")]
    shares = {
        stream: [(at, profile[stream]) for at, profile in told if profile.get(stream) is not None] for stream in streams
    }
    costs = {
        site: [(line["round"], cost) for line in run.rounds if (cost := line.get("epsilon", {}).get(site)) is not None]
        for site in run.site_names
    }
    return {
        "Training loss": chart(losses, y="loss"),
        "Saliency per stream (1 is a fair share)": chart(shares, y="saliency"),
        "Seconds per round": chart({"round": list(series(run, "seconds"))}, y="seconds"),
        "Planned epsilon": chart(costs, y="epsilon"),
    }


def _facts(run: Run) -> dict[str, str]:
    sizes = {f"bytes {direction}": sum(run.bytes_by_group(direction).values()) for direction in ("up", "down")}
    return {
        "hash of the experiment": experiment_hash(run.config),
        **{name: f"{size / 1e6:.1f} MB" for name, size in sizes.items()},
        "intended use": "research; not a medical device",
    }
