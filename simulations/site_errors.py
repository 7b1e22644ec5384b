"""The errors of simulated sites in their own words.

A site answers the server with the kind of an error alone, in a simulation as in a hospital. Who simulates owns the data
and is told the rest, from the log that each site keeps in the run folder.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from panfm.errors import one_line

_STORY = re.compile(r"^\d{4}-\d\d-\d\dT\S+$", re.MULTILINE)
_ERROR = re.compile(r"^(?:\w+\.)*(\w+(?:Error|Exit|Exception)\w*): (.*)$", re.MULTILINE)
_LONGEST = 1000


class SiteErrors:
    """Errors that the sites of a run log from now on."""

    def __init__(self, run_dir: Path) -> None:
        """Note where the logs end."""
        self._run_dir = run_dir
        self._ends = {path: path.stat().st_size for path in self._logs()}

    def lines(self) -> Iterator[str]:
        """One line for each error, equal ones of a site once."""
        for path in self._logs():
            text = path.read_bytes()[self._ends.get(path, 0) :].decode(errors="replace")
            stories = (_ERROR.findall(story) for story in _STORY.split(text))
            for kind, words in dict.fromkeys(errors[-1] for errors in stories if errors):
                yield f"site {path.parent.name}: {kind}: {one_line(words, _LONGEST)}"

    def _logs(self) -> list[Path]:
        return sorted(self._run_dir.glob("sites/*/site.log"))
