"""Every change of a chained file shows, but a cut at its end, which the anchor or a note tells."""

import hashlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from panfm.errors import DataError, LedgerError
from panfm.hash_chain import FIRST_HASH, HashChain, Position


def seal(content, before):
    digest = hashlib.sha256((before + json.dumps(content)).encode()).hexdigest()
    return json.dumps({**content, "hash": digest}).encode() + b"\n"


def append(chain: HashChain, *numbers: int, position: Position | None = None) -> Position:
    with chain.writing() as file:
        position = position or chain.snapshot(file)[1]
        for number in numbers:
            _, position = chain.append(file, position, {"number": number})
    return position


def numbers(chain: HashChain) -> list[int]:
    with chain.reading() as file:
        return [entry["number"] for entry in chain.verified(file.read())]


@pytest.fixture
def chain(tmp_path):
    return HashChain(tmp_path / "new" / "chain.jsonl", seal, key="hash", anchor=tmp_path / "anchor")


def test_a_line_by_hand(chain):
    position = append(chain, 7)
    digest = hashlib.sha256((FIRST_HASH + '{"number": 7}').encode()).hexdigest()
    assert chain.path.read_text() == f'{{"number": 7, "hash": "{digest}"}}\n'
    assert (position.end, position.size, chain.read_anchor()) == (digest, chain.path.stat().st_size, digest)


def test_there_is_nothing_before_the_first_line(chain):
    assert numbers(chain) == []
    assert chain.read_anchor() is None
    assert not chain.path.exists()
    assert append(chain).end == FIRST_HASH


def test_a_position_is_current_until_somebody_else_writes(chain):
    position = append(chain, 1, 2)
    with chain.reading() as file:
        assert position.is_current(file)
    other = append(HashChain(chain.path, seal, key="hash"), 3)
    with chain.reading() as file:
        assert not position.is_current(file)
        assert other.is_current(file)
        assert chain.snapshot(file)[1] == other
    assert numbers(chain) == [1, 2, 3]


def test_the_next_line_takes_the_place_of_one_that_a_crash_cut_short(chain):
    append(chain, 1)
    whole = chain.path.read_bytes()
    chain.path.write_bytes(whole + b'{"number": 2, "ha')
    assert numbers(chain) == [1]
    append(chain, 3)
    assert chain.path.read_bytes().startswith(whole)
    assert numbers(chain) == [1, 3]


def test_lines_that_were_cut_off_are_told_by_anchor_and_note(chain):
    position = append(chain, 1, 2)
    chain.path.write_bytes(chain.path.read_bytes().splitlines(keepends=True)[0])
    with chain.reading() as file:
        entries = list(chain.verified(file.read()))
    assert chain.read_anchor() == position.end != entries[-1]["hash"]
    chain.check_noted(entries, entries[0]["hash"])
    with pytest.raises(DataError, match="the end noted is not in it"):
        chain.check_noted(entries, position.end)


@given(st.integers(0, 2), st.sampled_from(["change", "remove", "repeat", "swap", "blank", "spaces", "no json"]))
def test_any_other_change_is_found_at_its_line(tmp_path_factory, index, kind):
    chain = HashChain(tmp_path_factory.mktemp("chain") / "file", seal, key="hash", error=LedgerError)
    append(chain, 1, 2, 3, 4)
    lines = chain.path.read_bytes().splitlines()
    changed = {
        "change": [lines[index].replace(b'"number": ', b'"number": 1')],
        "remove": [],
        "repeat": [lines[index], lines[index]],
        "swap": [lines[index + 1], lines[index]],
        "blank": [b"", lines[index]],
        "spaces": [lines[index].replace(b": ", b":")],
        "no json": [b"{", lines[index]],
    }[kind]
    rest = lines[index + (2 if kind == "swap" else 1) :]
    chain.path.write_bytes(b"".join(line + b"\n" for line in [*lines[:index], *changed, *rest]))
    at = index + (2 if kind == "repeat" else 1)
    with pytest.raises(LedgerError, match=f"line {at} "):
        numbers(chain)


def test_a_file_that_cannot_be_opened_is_one_line(tmp_path):
    (tmp_path / "chain").mkdir()
    chain = HashChain(tmp_path / "chain", seal, key="hash", error=LedgerError)
    for opened in (chain.writing, chain.reading):
        with pytest.raises(LedgerError, match=r"chain: .*cannot be .* \(Is a directory\)"), opened():
            pass
