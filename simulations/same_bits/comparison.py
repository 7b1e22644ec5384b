"""Compares the files of two runs value by value.

Every file becomes a table, from `<file>: <key>` to a tensor or a number or a word. Two tables must hold the same keys
and, to the bit, the same values, but for the differences that `allowed.toml` declares with a reason.

    model       model/model.safetensors, and its bytes
    state       the checkpoints of the server and the private state of the sites
    rounds      rounds.jsonl
    replies     what left each site, as recorded; of several replies to one question the last
    probe       probe.json
"""

import json
import re
import tomllib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np

from panfm.errors import ConfigError, DataError

PARTS = ("model", "state", "rounds", "replies", "probe")
ALLOWED = Path(__file__).with_name("allowed.toml")
_DIGEST_BYTES = 64
_MISSING = object()
_KEYS = {"allowed": {"run", "part", "key", "reason"}, "renamed": {"run", "part", "was", "now", "reason"}}
_DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1", "U8": "u1"}
Table = dict[str, Any]
"""`<file>: <key>` -> Tensor, or a JSON scalar."""


@dataclass(frozen=True)
class Tensor:
    """A tensor as it lies in a file."""

    dtype: str
    """Type by the name that safetensors give it; by NumPy's for other files."""
    shape: tuple[int, ...]
    data: bytes

    @classmethod
    def of(cls, array: np.ndarray[Any, Any]) -> "Tensor":
        """Make one from a copy of an array."""
        return cls(array.dtype.str, array.shape, array.tobytes())

    def numbers(self) -> np.ndarray[Any, Any] | None:
        """The numbers as float64; None for a type that NumPy does not have."""
        if self.dtype == "BF16":
            return (np.frombuffer(self.data, "<u2").astype("<u4") << 16).view("<f4").astype(np.float64)
        name = _DTYPES.get(self.dtype, self.dtype)
        return np.frombuffer(self.data, name).astype(np.float64) if re.fullmatch(r"[<|]?[fiu]\d", name) else None


@dataclass(frozen=True)
class RunFiles:
    """Folders in which one run left the files that are compared."""

    run_dir: Path
    replies: Path
    states: tuple[Path, ...]
    """Folders with `.state` files."""


@dataclass
class Allowances:
    """Declared differences between two versions, and how often each was met."""

    differences: tuple[Mapping[str, str], ...] = ()
    """Tables with `run` (a pattern of its name), `part`, `key` (a pattern of `<file>: <key>`) and `reason`."""
    renamed: tuple[Mapping[str, str], ...] = ()
    """Tables with `run`, `part`, `was` (a regular expression), `now` and `reason`: the base's `<file>: <key>` is
    renamed."""
    met: Counter[str] = field(default_factory=Counter)
    """Reason -> keys."""

    @classmethod
    def read(cls, path: Path = ALLOWED) -> "Allowances":
        """Read `allowed.toml`. Raises ConfigError for an entry of other keys, of no known part, or without a reason."""
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
        for kind, entries in tables.items():
            if kind not in _KEYS:
                raise ConfigError(f"{path}: {kind}: unknown, expected one of {', '.join(_KEYS)}")
            for entry in entries:
                if set(entry) != _KEYS[kind] or entry["part"] not in PARTS or not entry["reason"].strip():
                    raise ConfigError(f"{path}: {kind} {entry}: expected {sorted(_KEYS[kind])}, part one of {PARTS}")
        return cls(tuple(tables.get("allowed", ())), tuple(tables.get("renamed", ())))

    def of(self, run: str) -> "Allowances":
        """Allowances of one run, which share the counts."""
        differences = tuple(entry for entry in self.differences if fnmatchcase(run, entry["run"]))
        return Allowances(
            differences, tuple(entry for entry in self.renamed if fnmatchcase(run, entry["run"])), self.met
        )

    def allows(self, part: str, key: str) -> bool:
        """Whether a key may differ, or be on one side only."""
        reasons = [entry["reason"] for entry in self.differences if _matches(entry, part, key)]
        self.met.update(reasons[:1])
        return bool(reasons)

    def rename(self, part: str, table: Table) -> Table:
        """The base's table under the names of today."""
        return {self._renamed(part, key): value for key, value in table.items()}

    def _renamed(self, part: str, key: str) -> str:
        for entry in self.renamed:
            if entry["part"] == part and (now := re.sub(entry["was"], entry["now"], key)) != key:
                self.met[entry["reason"]] += 1
                key = now
        return key

    def unused(self) -> list[str]:
        """Reasons of entries that nothing needed."""
        return [entry["reason"] for entry in (*self.differences, *self.renamed) if not self.met[entry["reason"]]]


@dataclass(frozen=True)
class Difference:
    """One file that differs."""

    part: str
    file: str
    key: str
    """The first that differs."""
    story: str
    """How it differs."""
    num_keys: int

    def __str__(self) -> str:
        return f"{self.part}: {self.file}: {self.key}: {self.story} ({self.num_keys} keys differ)"


def compare(
    base: RunFiles, here: RunFiles, allowances: Allowances, parts: Iterable[str] = PARTS
) -> dict[str, list[Difference]]:
    """Part -> the files that differ between two runs.

    Raises:
        DataError: a file cannot be read as what it should be, or neither run left anything of a part.
    """
    result = {}
    for part in parts:
        before, now = read_part(base, part), read_part(here, part)
        if not before and not now:
            raise DataError(f"{here.run_dir}: {part}: neither side left any, expected some to compare")
        result[part] = compare_tables(part, allowances.rename(part, before), now, allowances)
    return result


def compare_tables(part: str, base: Table, here: Table, allowances: Allowances) -> list[Difference]:
    """The files of two tables that differ, with the first key of each."""
    stories: dict[str, list[tuple[str, str]]] = {}
    for name in dict.fromkeys([*base, *here]):
        story = _story(base.get(name, _MISSING), here.get(name, _MISSING))
        if story and not allowances.allows(part, name):
            file, _, key = name.partition(": ")
            stories.setdefault(file, []).append((key, story))
    return [Difference(part, file, *differing[0], len(differing)) for file, differing in stories.items()]


def read_part(files: RunFiles, part: str) -> Table:
    """Read one part of a run's files as a table. Raises DataError as `compare`."""
    readers = {"model": _model, "state": _states, "rounds": _rounds, "replies": _replies, "probe": _probe}
    try:
        return dict(readers[part](files))
    except (ValueError, KeyError) as error:
        raise DataError(f"{files.run_dir}: {part} cannot be read ({type(error).__name__}: {error})") from error


def _model(files: RunFiles) -> Iterator[tuple[str, Any]]:
    path = files.run_dir / "model" / "model.safetensors"
    if path.exists():
        content = path.read_bytes()
        yield from _safetensors(path.name, content)
        yield f"{path.name}: bytes", Tensor("bytes", (len(content),), content)


def _states(files: RunFiles) -> Iterator[tuple[str, Any]]:
    for folder in files.states:
        for path in sorted(folder.rglob("*.state")):
            name = f"{folder.name}/{path.relative_to(folder).as_posix()}"
            content = path.read_bytes()[_DIGEST_BYTES:]
            if content[:1] == b"{" and content[8:9] != b"{":  # a line of JSON comes before the tensors
                line, _, content = content.partition(b"\n")
                yield from _flat(f"{name}: words", json.loads(line))
            yield from _safetensors(name, content)


def _rounds(files: RunFiles) -> Iterator[tuple[str, Any]]:
    path = files.run_dir / "rounds.jsonl"
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        words = json.loads(line)
        yield from _flat(f"{path.name}: round {words['round']}", words)


def _replies(files: RunFiles) -> Iterator[tuple[str, Any]]:
    replies = [dict(np.load(path)) for path in sorted(files.replies.glob("*.npz"))]
    words = [json.loads(reply.pop("words").tobytes()) for reply in replies]
    sites = {table["node"]: table["config"]["config"]["site"] for table in words if table["kind"] == "query"}
    for table, arrays in zip(words, replies, strict=True):
        site = sites[table.pop("node")]
        round_number = table.get("config", {}).get("config", {}).get("round", 0)
        name = f"{site}/{table['kind']}-{round_number}"
        yield from _flat(f"{name}: reply", table)
        yield from ((f"{name}: arrays.{key}", Tensor.of(array)) for key, array in arrays.items())


def _probe(files: RunFiles) -> Iterator[tuple[str, Any]]:
    path = files.run_dir / "probe.json"
    if path.exists():
        yield from _flat(f"{path.name}: probe", json.loads(path.read_text(encoding="utf-8")))


def _safetensors(name: str, content: bytes) -> Iterator[tuple[str, Any]]:
    size = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + size]), content[8 + size :]
    for key, word in header.pop("__metadata__", {}).items():
        yield f"{name}: metadata.{key}", word
    for key, entry in header.items():
        begin, end = entry["data_offsets"]
        yield f"{name}: {key}", Tensor(entry["dtype"], tuple(entry["shape"]), data[begin:end])


def _flat(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
    """The scalars of a JSON value by dotted key; a description in TOML is taken apart as well."""
    if isinstance(value, str) and "\n" in value:
        with suppress(tomllib.TOMLDecodeError):
            value = tomllib.loads(value)
    if value and isinstance(value, Mapping | list):
        for key, part in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from _flat(f"{prefix}.{key}", part)
    else:
        yield prefix, value


def _story(base: Any, here: Any) -> str:
    """How two values differ; empty if they are the same, to the bit."""
    if base is _MISSING or here is _MISSING:
        return f"only in {'this tree' if base is _MISSING else 'the base'}"
    if isinstance(base, Tensor) and isinstance(here, Tensor):
        return _tensor_story(base, here)
    if type(base) is type(here) and repr(base) == repr(here):
        return ""
    change = f"{base!r:.40} -> {here!r:.40}"
    is_number = isinstance(base, int | float) and isinstance(here, int | float)
    return f"{change}, difference {abs(base - here):.3g}" if is_number else change


def _tensor_story(base: Tensor, here: Tensor) -> str:
    if base == here:
        return ""
    if (base.dtype, base.shape) != (here.dtype, here.shape):
        return f"{base.dtype}{list(base.shape)} -> {here.dtype}{list(here.shape)}"
    before, now = base.numbers(), here.numbers()
    if before is None or now is None:
        return "bytes differ"
    return f"max abs difference {np.max(np.abs(before - now)):.3g}"


def _matches(entry: Mapping[str, str], part: str, key: str) -> bool:
    return entry["part"] == part and fnmatchcase(key, entry["key"])
