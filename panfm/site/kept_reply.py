"""Keeps the last private reply of a run at a site, so that the same question gets the same bytes and costs nothing.

    <folder>/runs/<run id>/reply.kept     run, round, digest of the question, and patients; then the reply, checksummed

The reply is of no use to the next round: it goes when another question comes, with `panfm site end` and `site clean`.
"""

import hashlib
import json
from dataclasses import fields

from panfm.files import read_checked, write_checked
from panfm.sharing.frames import Frame, Kind, decode_whole, encode
from panfm.sharing.messages import RoundReply, RoundTask
from panfm.sharing.release import RoundResult
from panfm.site.state import REPLY, StateStore

_KEY_BYTES = 64


def keep_reply(states: StateStore, task: RoundTask, key: str, result: RoundResult) -> None:
    """Keep what a round gave, whatever of it `limits.may-leave` lets leave, for this account alone."""
    reply = RoundReply(task.run_id, task.round_number, **{name: getattr(result, name) for name in _RESULT})
    content = encode(Frame(Kind.ANSWER, reply.to_records()))
    write_checked(states.folder / REPLY, key.encode() + content, mode=0o600)


def kept_reply(states: StateStore, key: str) -> RoundResult | None:
    """What was kept under a key; what was kept under another one is removed. Raises DataError if it is corrupted."""
    path = states.folder / REPLY
    if not path.exists():
        return None
    content = read_checked(path)
    if content[:_KEY_BYTES] != key.encode():
        path.unlink()
        return None
    reply = RoundReply.from_records(decode_whole(content[_KEY_BYTES:]).records)
    return RoundResult(**{name: getattr(reply, name) for name in _RESULT}, is_repeat=True)


def reply_key(task: RoundTask, digest: str, patients: str) -> str:
    """SHA-256 of all that a question must have in common with that of a kept reply.

    Args:
        digest: Of the question's content and of the private state that it starts from.
        patients: Their fingerprint.
    """
    return hashlib.sha256(json.dumps([task.run_id, task.round_number, digest, patients]).encode()).hexdigest()


_RESULT = tuple(field.name for field in fields(RoundResult) if field.name != "is_repeat")
