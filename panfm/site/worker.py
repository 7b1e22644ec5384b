"""The resident worker: a process of the site that answers at a local socket, with model, images and state in memory.

Flower's client process, and the code in it that came from the server, can ask it for a handshake, a round, sums over
patients or an evaluation, and gets nothing else. One question at a time. Every answer is in the audit log before it
leaves, and all that the worker needs is on disk: killed at any point and started again, it gives the same bits.
"""

import grp
import logging
import os
import pwd
import socket
import struct
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from panfm.config import Releasable, SiteConfig, site_path
from panfm.config.run_description import SUPERVISED
from panfm.config.site_description import LimitsConfig
from panfm.errors import ConfigError, PanfmError
from panfm.files import is_locked, locked
from panfm.models.sizes import sizes_of
from panfm.registry import BACKBONES, MASKING_POLICIES, OBJECTIVES, READERS, import_class
from panfm.sharing.frames import Frame, Kind, address, encode, receive, send
from panfm.sharing.messages import Invitation, Records
from panfm.site.audit_log import AuditLog
from panfm.site.handler import answer, scrub
from panfm.site.site import Site, read_run

logger = logging.getLogger(__name__)

TRANSFER_TIMEOUT_S = 30.0
"""For a question to arrive, and for an answer to be taken."""
_BYTES_PER_PARAMETER = 8
"""Of a question: float32 of the global parameters, and of the teacher's."""
_PEER = struct.Struct("3i")


class Worker:
    """Answers the accounts that may ask, one question after the other."""

    def __init__(self, folder: Path, listener: socket.socket) -> None:
        """Open the site of a folder. It answers for experiments that its operator has approved, and for no other.

        Args:
            listener: The site's socket (`listen`).
        """
        self.site = Site(folder, needs_approval=True)
        self._listener = listener
        self._users = allowed_users(self.site.config)
        self._audit_log = AuditLog(self.site.state_dir)

    def serve_forever(self) -> None:
        """Answer one question after the other."""
        load_libraries(self.site.config.limits)
        while True:
            self.serve_one()

    def serve_one(self) -> None:
        """Wait for one connection and answer it. An error ends this connection, and never the worker."""
        connection, _ = self._listener.accept()
        with connection:
            try:
                if self._may_ask(connection) and (question := self._receive(connection)) is not None:
                    start = time.monotonic()
                    content = self._recorded(reply := answer(self.site, question))
                    send(connection, content, timeout_s=TRANSFER_TIMEOUT_S)
                    self._log(question, reply, {"seconds": time.monotonic() - start, "bytes": len(content)})
            except Exception as error:
                logger.warning("a connection ended without an answer (%s: %s)", type(error).__name__, error)

    def _may_ask(self, connection: socket.socket) -> bool:
        _, user, _ = _PEER.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))
        if user not in self._users:
            logger.warning("user %s is not in worker.users: hung up", user)
        return user in self._users

    def _receive(self, connection: socket.socket) -> Frame | None:
        """Read the question of a connection. If its bytes are not a question, send an error back and return None."""
        try:
            most = _BYTES_PER_PARAMETER * self.site.config.limits.parameters
            return receive(connection, timeout_s=TRANSFER_TIMEOUT_S, max_arrays=most, largest=_largest)
        except (PanfmError, MemoryError) as error:
            logger.warning("bytes that are not a question: %s", error)
            send(connection, encode(Frame.error(scrub(error))), timeout_s=TRANSFER_TIMEOUT_S)
            return None

    def _log(self, question: Frame, reply: Frame, numbers: dict[str, float]) -> None:
        run, number = self.site.asked_round or (None, None)
        words = f"{question.kind}: {reply.kind}, {numbers['bytes']} bytes after {numbers['seconds']:.1f} s"
        logger.info("%s", words, extra={"run": run, "round": number, "numbers": numbers})

    def _recorded(self, reply: Frame) -> bytes:
        """The bytes of a reply, once it is in the audit log."""
        content = encode(reply)
        spent, summed = self.site.epsilon_spent, self.site.summed
        self._audit_log.append(
            reply,
            content,
            experiment=self.site.experiment,
            privacy=self.site.privacy,
            epsilon=spent,
            summed=summed,
            is_repeat=self.site.is_repeat,
        )
        return content


def _largest(kind: Kind, config: Mapping[str, Any]) -> int:
    """Bytes of arrays that a question may hold: in a round, those of its model's parameters and its teacher's; in one
    for sums, those of the probe's as well."""
    if kind not in (Kind.ROUND, Kind.SUMS):
        return 0
    sizes = sizes_of(read_run(Invitation.from_records(Records(config=config)).run_toml))
    return _BYTES_PER_PARAMETER * sizes.parameters + (sizes.probe_bytes if kind is Kind.SUMS else 0)


def load_libraries(limits: LimitsConfig) -> None:
    """Import what the first question would import: a limit on time that ends an import leaves half a module behind."""
    import panfm.data.read

    if limits.epsilon is not None:
        import panfm.privacy.private_step
        import panfm.site.kept_reply
        import panfm.site.patient_budget
    if Releasable.MONITORS in limits.may_leave:
        import panfm.site.round_monitors
    if {Releasable.LABEL_SUMS, Releasable.INPUT_SUMS} & {*limits.may_leave}:
        import panfm.site.sums_answer
    if limits.devices > 1:
        import panfm.site.spread_session
    if limits.evaluation_labels:
        import panfm.site.evaluation_answer
    if limits.training_labels:
        import panfm.data.task_labels  # noqa: F401

    for registry in (READERS, MASKING_POLICIES, BACKBONES):
        for name in registry.names:
            registry.load(name)
    for name in OBJECTIVES.names:
        if name == SUPERVISED and not limits.training_labels:
            continue
        import_class(OBJECTIVES.load(name).implementation)
    torch.optim.AdamW([torch.zeros(1)])


@contextmanager
def listen(folder: Path, site: SiteConfig) -> Iterator[socket.socket]:
    """Open the site's socket, in a folder that nobody else may enter (or, with `worker.group`, that group only).

    Raises:
        ConfigError: another worker serves this site, or the socket cannot be made.
    """
    path = site_path(folder, site.worker.socket)
    with ExitStack() as stack:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _share(path.parent, site, 0o700, 0o710)
            stack.enter_context(locked(path.with_suffix(".lock"), wait_s=0.0))
            path.unlink(missing_ok=True)
            listener = stack.enter_context(socket.socket(socket.AF_UNIX))
            with address(path) as short:
                listener.bind(short)
            _share(path, site, 0o600, 0o660)
            listener.listen()
        except BlockingIOError as error:
            raise ConfigError(f"{folder}: another worker serves this site") from error
        except OSError as error:
            raise ConfigError(f"worker.socket: {path} cannot be made ({error.strerror})") from error
        yield listener


def check_closed(folder: Path, site: SiteConfig) -> None:
    """Raises ConfigError if every account of this machine may enter the site folder, and Flower runs under another."""
    if site.worker.users and folder.stat().st_mode & 0o007:
        raise ConfigError(f"{folder}: open to every account, Flower's among them; expected: chmod o= {folder}")


def is_running(folder: Path, site: SiteConfig) -> bool:
    """Whether a worker serves this site now."""
    return is_locked(site_path(folder, site.worker.socket).with_suffix(".lock"))


def allowed_users(site: SiteConfig) -> set[int]:
    """Ids of the accounts that may ask: the worker's own, and `worker.users`. Raises ConfigError for an unknown one."""
    try:
        return {os.getuid()} | {
            int(name) if name.isdigit() else pwd.getpwnam(name).pw_uid for name in site.worker.users
        }
    except KeyError as error:
        raise ConfigError(f"worker.users: {error.args[0]}") from error


def _share(path: Path, site: SiteConfig, alone: int, with_group: int) -> None:
    """Give a path the rights of its owner alone, or of a group as well."""
    if not (name := site.worker.group):
        path.chmod(alone)
        return
    try:
        os.chown(path, -1, int(name) if name.isdigit() else grp.getgrnam(name).gr_gid)
    except KeyError as error:
        raise ConfigError(f"worker.group: {error.args[0]}") from error
    path.chmod(with_group)
