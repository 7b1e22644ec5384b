"""What the server may learn of an error at a site: its kind, and no word that was written at the site.

A ProtocolError is about what the server itself sent, a LimitError names a limit, so their text passes. Any other error
may quote paths, keys of the site's own description, or subjects: only its kind passes. The full text stays in the
site's own log.
"""

from panfm.errors import BudgetError, ConfigError, DataError, LedgerError, LimitError, PanfmError, ProtocolError

_MAX_LENGTH = 200
_INSTEAD = {
    BudgetError: "this site's privacy budget does not cover another round",
    LedgerError: "this site's privacy ledger does not hold",
    ConfigError: "this site's own description does not hold",
    DataError: "this site's data or private state is faulty",
}


def scrub(error: BaseException) -> str:
    """One line for the server.

    Guarantees:
        no path, no data: of an error that is neither a ProtocolError nor a LimitError, nothing passes but its kind.
    """
    kind = type(error).__name__
    if isinstance(error, ProtocolError | LimitError):
        return f"{kind}: {' '.join(str(error).split())}"[:_MAX_LENGTH]
    if not isinstance(error, PanfmError):
        return f"internal error ({kind})"
    return f"{kind}: {_INSTEAD.get(type(error), 'this site cannot go on')}; its log tells more"
