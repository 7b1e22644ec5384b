"""What the server may learn of an error at a site: its kind, and no word that was written at the site.

A ProtocolError is about what the server itself sent, so its text passes. Of a LimitError passes what it declares as
public, since a text that counts patients or measures images tells of them. Any other error may quote paths, keys of the
site's own description, or subjects: only its kind passes. The full text stays in the site's own log.
"""

from panfm.errors import BudgetError, ConfigError, DataError, LedgerError, LimitError, PanfmError, ProtocolError

_MAX_LENGTH = 200
_INSTEAD = {
    BudgetError: "this site's privacy budget does not cover another round",
    LedgerError: "this site's privacy ledger does not hold",
    ConfigError: "this site's own description does not hold",
    DataError: "this site's data or private state is faulty",
    LimitError: "this goes beyond what this site allows",
}


def scrub(error: BaseException) -> str:
    """One line for the server.

    Guarantees:
        no path, no data: of an error that is no ProtocolError and declares no public text, nothing passes but its kind.
    """
    kind = type(error).__name__
    public = str(error) if isinstance(error, ProtocolError) else error.public if isinstance(error, LimitError) else None
    if public or isinstance(error, ProtocolError):
        return f"{kind}: {' '.join((public or '').split())}"[:_MAX_LENGTH]
    if not isinstance(error, PanfmError):
        return f"internal error ({kind})"
    return f"{kind}: {_INSTEAD.get(type(error), 'this site cannot go on')}; its log tells more"
