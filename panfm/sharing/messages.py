"""Messages between server and site, as plain values: no Flower, no torch, no run descriptions. Light.

Every message travels as `Records`: named arrays, numbers, and words. Flower's records, or a local socket, carry them
without knowing what they mean.

    down   arrays   <group>                float32 [size], parameters; or, to a site that holds those of the round
                                           before, the step since, coded as updates are (coding.py)
                    <group>/teacher        float32 [size], the server's EMA, if teachers start there
                    <group>/frozen         float32 [size], parameters that are not trained; to a site that lacks them
           config   run-id, round, run, profile, digests (of the parameters that a step leads to)
    up     arrays   <group>                float32, uint16 (bf16) or int8 [size], update (coding.py)
                    <group>/scale          float32 [rows], only with int8
           metrics  weight/<group>         list of one, or of one per expert
                    saliency/<stream>      number
                    monitor/<name>         number
                    loss, validation-loss, num-skipped
           config   run-id, round, state-round
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

from panfm.errors import ProtocolError
from panfm.texts import MAX_BYTES

if TYPE_CHECKING:
    from panfm.sharing.coding import Arrays
    from panfm.sharing.groups import Flat
    from panfm.sharing.weights import Weights

Metric = float | int | list[float]
_WEIGHT = "weight/"
_SALIENCY = "saliency/"
_MONITOR = "monitor/"
_TEACHER = "/teacher"
_FROZEN = "/frozen"
_MAX_ENTRIES = 4096
"""Arrays, metrics and words of one message, together."""
_MAX_NAME = 256
"""Characters of a name, and of a text in a list."""
_MAX_LIST = 1 << 16
_MAX_VERSIONS = 16


@dataclass(frozen=True)
class Records:
    """Content of a message."""

    arrays: Arrays = field(default_factory=dict)
    metrics: Mapping[str, Metric] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    """Scalars, and lists of one scalar type."""


@dataclass(frozen=True)
class Invitation:
    """The server's question to a site before round 1."""

    run_toml: str
    """The resolved run description."""

    def to_records(self) -> Records:
        """Convert to records."""
        return Records(config={"run": self.run_toml})

    @classmethod
    def from_records(cls, records: Records) -> Self:
        """Read it back. Raises ProtocolError if it is missing."""
        return cls(run_toml=config_value(records.config, "run", str))


@dataclass(frozen=True)
class Handshake:
    """A site's answer to an invitation. Only `panfm.sharing.release.build_handshake` makes one."""

    site: str
    subjects: int
    """Subjects in the train split; 0: withheld."""
    streams: Mapping[str, int]
    """Stream of the site -> subjects of the train split with it."""
    versions: Mapping[str, str]
    experiment: str
    """Hash of the server's run description as this site reads it, defaults included."""
    group_hashes: Mapping[str, str]
    """Group this site trains -> layout."""

    def to_records(self) -> Records:
        """Convert to records."""
        return Records(
            config={
                "site": self.site,
                "subjects": self.subjects,
                "experiment": self.experiment,
                **_parallel("streams", self.streams),
                **_parallel("versions", self.versions),
                **_parallel("groups", self.group_hashes),
            }
        )

    @classmethod
    def from_records(cls, records: Records) -> Self:
        """Read it back. Raises ProtocolError if something is missing or of the wrong type."""
        config = records.config
        return cls(
            site=config_value(config, "site", str),
            subjects=config_value(config, "subjects", int),
            streams=_table(config, "streams", int),
            versions=_versions(config),
            experiment=config_value(config, "experiment", str),
            group_hashes=_table(config, "groups", str),
        )


@dataclass(frozen=True)
class RoundTask:
    """The server's question to a site in one round."""

    run_id: str
    round_number: int
    """From 1."""
    run_toml: str
    """The resolved run description."""
    groups: Arrays
    """Group -> global parameters, packed; with `digests`, the coded step to them from those of the round before."""
    profile: Mapping[str, float] | None = None
    """Federation's saliency per stream, relative to an equal split."""
    digests: Mapping[str, str] = field(default_factory=dict)
    """Group -> digest of its global parameters, where `groups` holds a step."""
    teacher: Mapping[str, Flat] = field(default_factory=dict)
    """Group -> the server's EMA of its parameters, if teachers start there."""
    frozen: Mapping[str, Flat] = field(default_factory=dict)
    """Group -> its parameters that the run does not train; empty for a site that has them."""

    def to_records(self) -> Records:
        """Convert to records."""
        config = {"run-id": self.run_id, "round": self.round_number, "run": self.run_toml}
        config |= _parallel("profile", self.profile) if self.profile else {}
        config |= digest_words(self.digests) if self.digests else {}
        teacher = {teacher_name(group): flat for group, flat in self.teacher.items()}
        frozen = {frozen_name(group): flat for group, flat in self.frozen.items()}
        return Records({**self.groups, **teacher, **frozen}, {}, config)

    @classmethod
    def from_records(cls, records: Records) -> Self:
        """Read it back. Raises ProtocolError if something is missing or of the wrong type."""
        config = records.config
        return cls(
            run_id=config_value(config, "run-id", str),
            round_number=config_value(config, "round", int),
            run_toml=config_value(config, "run", str),
            groups={n: array for n, array in records.arrays.items() if not n.endswith((_TEACHER, _FROZEN))},
            profile=_profile(config) if "profile-names" in config else None,
            digests=_table(config, "digests", str) if "digests-names" in config else {},
            teacher=_named(records.arrays, _TEACHER),
            frozen=_named(records.arrays, _FROZEN),
        )


@dataclass(frozen=True)
class RoundReply:
    """A site's answer to a round's task. Only `panfm.sharing.release.build_reply` makes one."""

    run_id: str
    round_number: int
    state_round: int
    """The round whose private state the site started from; 0: none, it started fresh."""
    updates: Arrays
    """Local minus global parameters, packed and coded as `sharing.coding` says (coding.py)."""
    weights: Mapping[str, Weights]
    """Group -> weights of this site: one, or one per expert."""
    loss: float | None = None
    validation_loss: float | None = None
    num_skipped: int | None = None
    """Local steps left out because they were not finite."""
    saliency: Mapping[str, float] = field(default_factory=dict)
    monitors: Mapping[str, float] = field(default_factory=dict)
    """Name -> number of the last batch (panfm/training/monitors.py)."""

    def to_records(self) -> Records:
        """Convert to records."""
        numbers = {"loss": self.loss, "validation-loss": self.validation_loss, "num-skipped": self.num_skipped}
        metrics: dict[str, Metric] = {key: value for key, value in numbers.items() if value is not None}
        metrics |= {_WEIGHT + group: list(weights) for group, weights in self.weights.items()}
        metrics |= {_SALIENCY + stream: share for stream, share in self.saliency.items()}
        metrics |= {_MONITOR + name: value for name, value in self.monitors.items()}
        config = {"run-id": self.run_id, "round": self.round_number, "state-round": self.state_round}
        return Records(self.updates, metrics, config)

    @classmethod
    def from_records(cls, records: Records) -> Self:
        """Read it back. Raises ProtocolError if something is missing or of the wrong type."""
        metrics, config = records.metrics, records.config
        skipped = metrics.get("num-skipped")
        return cls(
            run_id=config_value(config, "run-id", str),
            round_number=config_value(config, "round", int),
            state_round=config_value(config, "state-round", int),
            updates=records.arrays,
            weights={group: tuple(_numbers(metrics, _WEIGHT + group)) for group in _under(metrics, _WEIGHT)},
            loss=_optional(metrics, "loss"),
            validation_loss=_optional(metrics, "validation-loss"),
            num_skipped=skipped if isinstance(skipped, int) else None,
            saliency={stream: _number(metrics, _SALIENCY + stream) for stream in _under(metrics, _SALIENCY)},
            monitors={name: _number(metrics, _MONITOR + name) for name in _under(metrics, _MONITOR)},
        )


def check_count(entries: int) -> None:
    """Raises ProtocolError for a message of more entries than any of ours has: checking an entry takes time."""
    if entries > _MAX_ENTRIES:
        raise ProtocolError(f"message: {entries} arrays, metrics and words, expected at most {_MAX_ENTRIES}")


def check_words(records: Records) -> None:
    """Raises ProtocolError if another party's message has more or longer words than any of ours."""
    check_count(len(records.arrays) + len(records.metrics) + len(records.config))
    for name in (*records.arrays, *records.metrics, *records.config):
        _check_value("a name", name, _MAX_NAME)
    for table in (records.metrics, records.config):
        for name, value in table.items():
            if isinstance(value, list) and len(value) > _MAX_LIST:
                raise ProtocolError(f"message: {name} is a list of {len(value)}, expected at most {_MAX_LIST}")
            for item in value if isinstance(value, list) else ():
                _check_value(name, item, _MAX_NAME)
            _check_value(name, value, MAX_BYTES)


def _check_value(name: str, value: object, most: int) -> None:
    if isinstance(value, str):
        if len(value) > most or not _is_unicode(value):
            raise ProtocolError(f"message: {name} is a text of {len(value)} characters, expected at most {most}")
    elif isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ProtocolError(f"message: {name} is an integer of more than 64 bits")


def _is_unicode(text: str) -> bool:
    """Whether a text can be written down as UTF-8: JSON may hold halves of characters."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def digest_words(digests: Mapping[str, str]) -> dict[str, list[str]]:
    """Digests in the config of a task."""
    return _parallel("digests", digests)


def teacher_name(group: str) -> str:
    """Name of the array of a task that holds a group of the teacher's parameters."""
    return group + _TEACHER


def frozen_name(group: str) -> str:
    """Name of the array of a task that holds a group's parameters that are not trained."""
    return group + _FROZEN


def _named(arrays: Arrays, suffix: str) -> dict[str, Any]:
    return {name.removesuffix(suffix): array for name, array in arrays.items() if name.endswith(suffix)}


def _parallel(key: str, table: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Two lists stand for a table: Flower's records hold no nested tables."""
    return {f"{key}-names": list(table), f"{key}-values": list(table.values())}


def _versions(config: Mapping[str, Any]) -> dict[str, str]:
    versions = _table(config, "versions", str)
    if len(versions) > _MAX_VERSIONS or not all(word.isprintable() for pair in versions.items() for word in pair):
        raise ProtocolError(f"message: versions are more than {_MAX_VERSIONS}, or not printable")
    return versions


def _profile(config: Mapping[str, Any]) -> dict[str, float]:
    profile = _table(config, "profile", float)
    return {stream: _number(profile, stream) for stream in profile}


def _table(config: Mapping[str, Any], key: str, kind: type[Any]) -> dict[str, Any]:
    names, values = config_value(config, f"{key}-names", list), config_value(config, f"{key}-values", list)
    are_sound = all(isinstance(name, str) for name in names) and all(isinstance(value, kind) for value in values)
    if len(names) != len(values) or not are_sound:
        raise ProtocolError(f"message: {key} is not a table of {kind.__name__}")
    return dict(zip(names, values, strict=True))


def config_value(config: Mapping[str, Any], key: str, kind: type[Any]) -> Any:
    """The word or number under a key. Raises ProtocolError if it is missing or of another type."""
    value = config.get(key)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ProtocolError(f"message: {key} is {type(value).__name__}, expected {kind.__name__}")
    return value


def _under(metrics: Mapping[str, Any], prefix: str) -> list[str]:
    return [key.removeprefix(prefix) for key in metrics if key.startswith(prefix)]


def _number(metrics: Mapping[str, Any], key: str) -> float:
    value = metrics[key]
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise ProtocolError(f"message: {key} is {value!r:.40}, expected a finite number")
    return float(value)


def _numbers(metrics: Mapping[str, Any], key: str) -> list[float]:
    values = metrics[key]
    if not isinstance(values, list):
        raise ProtocolError(f"message: {key} is {values!r:.40}, expected a list of numbers")
    return [_number({key: value}, key) for value in values]


def _optional(metrics: Mapping[str, Any], key: str) -> float | None:
    value = metrics.get(key)
    return float(value) if isinstance(value, int | float) else None
