"""Private states of a site's runs that are over, which the operator may remove."""

import time
from pathlib import Path

from panfm.config.site_description import LimitsConfig
from panfm.files import RoundFiles
from panfm.site.state import ASKED, FROZEN, REPLY, RUNS, is_ended, read_asked


def states_of_past_runs(state_dir: Path, limits: LimitsConfig) -> list[Path]:
    """List the private states of runs that the operator has ended, or that are finished and quiet for `idle-hours`.

    What such a run has asked, and that it was ended, stays noted: it goes on under no other answer.
    """
    paths: list[Path] = []
    for note in sorted(state_dir.glob(f"{RUNS}/*/{ASKED}")):
        folder, asked = note.parent, read_asked(note.parent)
        is_quiet = asked is not None and asked.newest < time.time() - 3600.0 * limits.idle_hours
        if is_ended(folder) or (asked is not None and asked.is_finished and is_quiet):
            states = RoundFiles(folder)
            paths += [states.path(number) for number in states.rounds()]
            paths += [path for path in (folder / FROZEN, folder / REPLY) if path.exists()]
    return paths
