"""What the server may learn of an error at a site: its kind and a line without paths or identifiers.

The full text stays in the site's own log.
"""

import re

from panfm.errors import ConfigError, PanfmError, ProtocolError, RunError

_MAX_LENGTH = 200
_SPEAKABLE = (ConfigError, ProtocolError, RunError)
"""Errors about the run and its messages, which the server knows already. Data errors quote files and subjects."""
_QUOTED = re.compile(r"'[^']*'|\"[^\"]*\"")


def scrub(error: BaseException) -> str:
    """One line for the server.

    Guarantees:
        no path: no word with a slash or backslash passes, nor anything in quotes.
        no data: of a DataError, or an error that is not ours, only the kind passes.
    """
    kind = type(error).__name__
    if not isinstance(error, _SPEAKABLE):
        return kind if isinstance(error, PanfmError) else f"internal error ({kind})"
    line = str(error).splitlines()[0] if str(error) else ""
    words = (word for word in _QUOTED.sub("...", line).split() if "/" not in word and "\\" not in word)
    return f"{kind}: {' '.join(words)}"[:_MAX_LENGTH]
