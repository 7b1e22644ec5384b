"""Subject identifiers: one rule by which two spellings are one subject."""

import re
import unicodedata

from panfm.cells import visible

_LEADING_ZEROS = re.compile(r"(?<!\d)0+(?=\d)")
_SHORTENED = re.compile(r"\d(?:[.,]\d+)?E\+\d+", re.IGNORECASE)
SHORTENED = "an identifier that no spreadsheet has shortened: format the column as text, and write it anew"
"""Text of errors: what is expected instead of an identifier such as 1.23E+05."""


def subject_key(subject: str) -> str:
    """Normalise an identifier: equal keys are one subject.

    Neither case, Unicode form (NFC, NFD, full width), characters without width, space around it nor leading zeros of a
    number tell subjects apart: `S-007` is `s-7`.
    """
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", subject).casefold())
    return _LEADING_ZEROS.sub("", " ".join(unicodedata.normalize("NFKC", visible(text)).split()))


def is_shortened(subject: str) -> bool:
    """Whether a spreadsheet has shortened an identifier to a form such as 1.23E+05, which others may share."""
    return _SHORTENED.fullmatch(subject) is not None
