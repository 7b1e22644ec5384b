"""Keeps the coordinator's record of hospitals, in $FLWR_HOME/hospitals.toml: whose key was let in, and until when.

Each registration is an entry that is never removed. It is written before Flower is asked, with the nodes that Flower
knew then, and again after its answer; so a command that was killed in between finds its node when it is given again.
"""

import base64
import binascii
import hashlib
import re
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import tomli_w
from pydantic import Field, ValidationError

from panfm.certificates import certificate_end
from panfm.config.base import Config, Name
from panfm.errors import ConfigError, RunError, one_line, reason
from panfm.files import locked, write_atomic
from server.flower_cli import flwr
from server.kit import check_hospital

_ENDED = ("unregistered", "deleted")
"""Statuses of a node that Flower lets in no more."""
_KEY_IN_USE = "already in use"
_WAIT_S = 60.0


class Registration(Config):
    """One key of one hospital."""

    hospital: Name
    fingerprint: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    """SHA-256 of the public key, in hexadecimal digits."""
    asked: str
    """When Flower was first asked to let the key in."""
    known_nodes: Annotated[tuple[str, ...], Field(strict=False)] = ()
    """Nodes that Flower knew before."""
    node_id: str = ""
    """Flower's number of the SuperNode; empty until Flower has answered."""
    registered: str = ""
    certificate_ends: str = ""
    """When the certificate authority ends that the connection trusted."""
    revoked: str = ""
    """When the key was shut out; empty while it is let in."""


class Hospitals:
    """The record, and Flower's registrations that it is of."""

    def __init__(self, environment: Mapping[str, str], connection: str) -> None:
        """Args: environment: with FLWR_HOME. connection: name of the SuperLink connection in its config.toml."""
        self.environment = environment
        self.connection = connection
        self.home = Path(environment.get("FLWR_HOME") or Path.home() / ".flwr")
        self.path = self.home / "hospitals.toml"

    def entries(self) -> list[Registration]:
        """All registrations, the oldest first; none if there is no record. Raises ConfigError if it is damaged."""
        if not self.path.exists():
            return []
        try:
            listed = tomllib.loads(self.path.read_text(encoding="utf-8"))["registration"]
            return [Registration.model_validate(entry, by_name=False) for entry in listed]
        except (OSError, ValueError, KeyError, TypeError, ValidationError) as error:
            raise ConfigError(f"{self.path}: expected a record of registrations ({reason(error)})") from error

    def register(self, hospital: str, public_key: Path, told: str, *, renew: bool = False) -> Registration:
        """Let a hospital's key in, once its fingerprint is the one that was told by telephone.

        Args:
            hospital: Its name.
            public_key: File that the hospital has sent.
            told: The fingerprint that it has read out.
            renew: Shut the hospital's earlier key out first.
        Raises:
            ConfigError: the name, key or fingerprint does not hold, or the hospital has a key already.
            RunError: Flower refuses.
        """
        check_hospital(hospital)
        fingerprint = fingerprint_of(public_key)
        if plain_fingerprint(told) != fingerprint:
            raise ConfigError(f"{public_key}: its fingerprint is {spelled(fingerprint)}, another than was told")
        with self._locked():
            entries = self.entries()
            live = [entry for entry in entries if entry.hospital == hospital and not entry.revoked]
            same = [entry for entry in entries if entry.fingerprint == fingerprint]
            if any(entry.revoked or entry.hospital != hospital for entry in same):
                raise ConfigError(f"{public_key}: was let in as {same[0].hospital} before; expected a new key")
            if any(entry.node_id for entry in same):
                raise ConfigError(f"{hospital}: this key is registered already, as node {same[0].node_id}")
            if [entry for entry in live if entry not in same and entry.node_id] and not renew:
                raise ConfigError(f"{hospital}: has a key already; --renew puts this one in its place")
            for earlier in live:
                if earlier not in same:
                    entries = self._shut_out(entries, earlier)
            return self._let_in(entries, same[0] if same else None, hospital, fingerprint, public_key)

    def revoke(self, hospital: str) -> list[Registration]:
        """Shut out all keys of a hospital; the record keeps them. Raises ConfigError if it has none."""
        check_hospital(hospital)
        with self._locked():
            entries = self.entries()
            live = [entry for entry in entries if entry.hospital == hospital and not entry.revoked]
            if not live:
                known = sorted({entry.hospital for entry in entries if not entry.revoked})
                raise ConfigError(
                    f"{hospital}: no key of it is let in; expected one of: {', '.join(known) or 'nobody'}"
                )
            for entry in live:
                entries = self._shut_out(entries, entry)
            return [entry for entry in entries if entry.hospital == hospital]

    def statuses(self) -> dict[str, str]:
        """Status of each node that Flower knows: registered, online, offline, unregistered."""
        nodes = flwr(["supernode", "list", self.connection], self.environment)["nodes"]
        return {str(node["node-id"]): str(node["status"]) for node in nodes}

    def _let_in(
        self, entries: list[Registration], asked: Registration | None, hospital: str, fingerprint: str, public_key: Path
    ) -> Registration:
        if asked is None:
            known = tuple(sorted(self.statuses()))
            asked = Registration(hospital=hospital, fingerprint=fingerprint, asked=_now(), known_nodes=known)
            entries = [*entries, asked]
            self._write(entries)
        words = ["supernode", "register", str(public_key), self.connection, "--name", hospital]
        try:
            node_id = str(flwr(words, self.environment)["node-id"])
        except RunError as error:
            if _KEY_IN_USE not in str(error):
                raise
            node_id = self._node_of(asked, entries)
        done = {"node_id": node_id, "registered": _now(), "certificate_ends": self._certificate_end()}
        entry = asked.model_copy(update=done)
        self._write([entry if listed == asked else listed for listed in entries])
        return entry

    def _node_of(self, asked: Registration, entries: list[Registration]) -> str:
        """The node that Flower made for a registration whose answer was lost."""
        known = {*asked.known_nodes, *(entry.node_id for entry in entries)}
        new = [node for node, status in self.statuses().items() if node not in known and status not in _ENDED]
        if len(new) != 1:
            nodes = ", ".join(new) or "none"
            raise RunError(
                f"{asked.hospital}: Flower knows this key, and of its nodes the record lacks {nodes}; "
                "unregister what is not yours (flwr supernode unregister NODE) and ask for a new key"
            )
        return new[0]

    def _shut_out(self, entries: list[Registration], entry: Registration) -> list[Registration]:
        """Have Flower shut a key out, and write down when."""
        if entry.node_id:
            try:
                flwr(["supernode", "unregister", entry.node_id, self.connection], self.environment)
            except RunError:
                if self.statuses().get(entry.node_id, _ENDED[0]) not in _ENDED:
                    raise
        elif {*self.statuses()} - {*entry.known_nodes, *(listed.node_id for listed in entries)}:
            raise RunError(f"{entry.hospital}: its registration was cut short; give the command `register` again first")
        ended = entry.model_copy(update={"revoked": _now()})
        entries = [ended if listed == entry else listed for listed in entries]
        self._write(entries)
        return entries

    def _write(self, entries: list[Registration]) -> None:
        listed = [entry.model_dump(by_alias=True) for entry in entries]
        write_atomic(self.path, tomli_w.dumps({"registration": listed}).encode())

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Nobody else changes the record meanwhile."""
        if not self.home.is_dir():
            raise ConfigError(
                f"FLWR_HOME: found no folder {self.home}, expected the one with the SuperLink connections"
            )
        with locked(self.home / "hospitals.lock", wait_s=_WAIT_S):
            yield

    def _certificate_end(self) -> str:
        """When the first of the authorities ends that the connection trusts; empty if it trusts the system's."""
        connections = tomllib.loads((self.home / "config.toml").read_text(encoding="utf-8"))["superlink"]
        file = connections.get(self.connection, {}).get("root-certificates")
        if not file:
            return ""
        end = certificate_end(Path(file).expanduser())
        return datetime.fromtimestamp(end, UTC).isoformat(timespec="seconds")


def fingerprint_of(public_key: Path) -> str:
    """SHA-256, in hexadecimal digits, of a public key of ssh-keygen. Raises ConfigError if it is none."""
    try:
        kind, blob, *_ = public_key.read_text(encoding="ascii").split()
        if not kind.startswith("ecdsa-sha2-nistp"):
            raise ConfigError(f"{public_key}: found {one_line(kind, 40)!r}, expected an ECDSA public key (NAME.pub)")
        return hashlib.sha256(base64.b64decode(blob, validate=True)).hexdigest()
    except (OSError, ValueError, binascii.Error) as error:
        raise ConfigError(f"{public_key}: expected one line of an ECDSA public key ({reason(error)})") from error


def plain_fingerprint(told: str) -> str:
    """A fingerprint as hexadecimal digits: given in groups of digits, or as `ssh-keygen -l` prints it.

    Raises ConfigError if it is neither.
    """
    text = "".join(told.split())
    if text.startswith("SHA256:"):
        try:
            digits = base64.b64decode(f"{text.removeprefix('SHA256:').rstrip('=')}=", validate=True).hex()
        except binascii.Error:
            digits = ""
    else:
        digits = re.sub(r"[-:.,]", "", text).lower()
    if not re.fullmatch(r"[0-9a-f]{64}", digits):
        shown = one_line(repr(told), 90)
        raise ConfigError(f"--fingerprint: found {shown}, expected 16 groups of 4 digits or letters a-f, or SHA256:...")
    return digits


def spelled(fingerprint: str) -> str:
    """A fingerprint in groups of four digits, to read out."""
    return " ".join(fingerprint[at : at + 4] for at in range(0, len(fingerprint), 4))


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
