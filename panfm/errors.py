"""Every error a user can meet.

PanfmError
|-- ConfigError     a run or site description is wrong
|-- DataError       a file, manifest or label table is wrong
|   `-- NoSubjectsError  nobody is left to train on, or to test
|-- ProtocolError   a message between server and site is wrong
|-- LimitError      what was asked goes beyond what a site allows
|   `-- PendingApprovalError  an experiment waits for the decision of a site's operator
|-- LedgerError     the record of privacy spent is missing, foreign or changed
|-- BudgetError     a site's privacy budget does not cover what is asked
`-- RunError        a run could not do what was asked (failed round, lost quorum)

The text says what was found, where, and what was expected, on one line: tools print it and exit with status 1.
"""

from collections.abc import Iterable


class PanfmError(Exception):
    """Base of all errors meant for users; `str(error)` is one readable line."""


class ConfigError(PanfmError):
    """A run or site description does not hold."""


class DataError(PanfmError):
    """A data file does not hold what its manifest promises."""


class NoSubjectsError(DataError):
    """A split of a site or folder has no subject that holds one of the streams that are asked for."""

    @classmethod
    def of(cls, place: str, split: str, streams: Iterable[str]) -> "NoSubjectsError":
        """Tell the place, the split and the streams."""
        given, expected = cls.words(split, streams)
        return cls(f"{place}: found {given}, expected {expected}")

    @staticmethod
    def words(split: str, streams: Iterable[str]) -> tuple[str, str]:
        """What was found, and what was expected."""
        given = f"no subject in the {split} split that holds one of {', '.join(streams) or 'no streams'}"
        return given, "at least one (see the split column of the manifest)"


class ProtocolError(PanfmError):
    """A message between server and site breaks the contract."""


class LimitError(PanfmError):
    """A question to a site goes beyond the site's own limits.

    The server is told nothing of the text unless the error says what it may be told.
    """

    def __init__(self, text: str, *, public: str = "") -> None:
        """The text is for the site's own log.

        Args:
            public: What the server may be told: made of its own words and the site's limits, of no patient's data and
                of no number counted at the site.
        """
        super().__init__(text)
        self.public = public

    @classmethod
    def of_question(cls, text: str) -> "LimitError":
        """An error whose whole text is made of the server's own words and the site's limits."""
        return cls(text, public=text)


class PendingApprovalError(LimitError):
    """The operator of a site has not approved an experiment yet, or the approval has run out.

    The same question is answered once the operator approves, so the server may ask again later.
    """


class LedgerError(PanfmError):
    """The record of privacy spent does not hold."""


class BudgetError(PanfmError):
    """A private round would cost more than the site may spend."""


class RunError(PanfmError):
    """A run ended without doing what was asked."""


def one_line(text: str, limit: int = 300) -> str:
    """Turn another party's text into one line that is safe to print: printable characters only, cut at `limit`."""
    line = "".join(letter if letter.isprintable() else "?" for letter in " ".join(text[: 4 * limit].split()))
    return line if len(line) <= limit else f"{line[: limit - 3]}..."


def reason(error: BaseException) -> str:
    """Say why a file could not be read or written: the kind of error, and the system's or parser's own words."""
    text = one_line((error.strerror if isinstance(error, OSError) else None) or str(error), 120)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
