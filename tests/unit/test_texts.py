"""Nesting depth of untrusted texts, checked by hand and against the parser."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from panfm import texts
from panfm.config.run_file import toml_names
from panfm.errors import ConfigError

QUOTES = '"' * 3


@pytest.mark.parametrize(
    ("text", "max_bytes", "why"),
    [
        ("a = 1", 5, None),
        ("a = 1", 4, "here: more than 4 bytes of text"),
        ("a = '\u00fc'", 7, "here: more than 7 bytes"),
        ("a = ", 9, "here: not valid TOML"),
        (f"a = {2**63 - 1}", 99, None),
        (f"a = {2**63}", 99, "here: an integer of more than 64 bits"),
        (f"a = [[{{b = {-(2**63) - 1}}}]]", 99, "here: an integer of more than 64 bits"),
    ],
)
def test_toml(text, max_bytes, why):
    if why is None:
        assert texts.parse_toml(text, "here", max_bytes=max_bytes)
    else:
        with pytest.raises(ConfigError, match=why):
            texts.parse_toml(text, "here", max_bytes=max_bytes)


@pytest.mark.parametrize("text", ["[" * 60_000, "{", "9" * 5000, "[" * 20 + "]" * 20, ""])
def test_json_that_does_not_hold(text):
    with pytest.raises(ConfigError, match="here: "):
        texts.parse_json(text, "here")


def test_a_file_is_read_no_further_than_its_limit(tmp_path):
    path = tmp_path / "text"
    path.write_bytes("\u4e2d".encode() * 10)
    assert texts.read_text(path) == "\u4e2d" * 10
    with pytest.raises(ConfigError, match="more than 4 bytes"):
        texts.check_text(texts.read_text(path, max_bytes=4), "here", max_bytes=4)
    path.write_bytes(b"\xff")
    with pytest.raises(UnicodeDecodeError):
        texts.read_text(path)


@pytest.mark.parametrize(
    ("text", "depth"),
    [
        ("a = 1", 0),
        ("a.b = 15", 1),
        ("a = 1.5", 1),
        ("[a.b]\nc = 1", 2),
        ("[a]\nb = [[1, 2], [3]]", 2),
        ("a = {b = {c.d = 1}, e = 2}", 3),
        ('a = "[[[[{{{{a.a.a"', 0),
        ("a = '[[[['", 0),
        (f'a = {QUOTES}\n[["{QUOTES}\nb = [1]', 1),
        (f'a = {QUOTES}[["{QUOTES}""\nb = 1', 0),
        ("a = '''[[''[['''\nb = 1", 0),
        ('a = "\\"[[[["', 0),
        ("# [[[[\na = 1", 0),
        ('"a.b.c".d = 1', 1),
        ('{"a": {"b": [1.5, 2.5]}}', 4),
    ],
)
def test_depth_by_hand(monkeypatch, text, depth):
    monkeypatch.setattr(texts, "MAX_DEPTH", depth)
    texts.check_text(text, "here")
    monkeypatch.setattr(texts, "MAX_DEPTH", depth - 1)
    if depth:
        with pytest.raises(ConfigError, match="here: nested deeper"):
            texts.check_text(text, "here")


def _nested(value: object) -> int:
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return max((1 + _nested(child) for child in children), default=0)


@given(st.text(alphabet="[]{}.,=\n\"'#\\ab1 ", max_size=60))
def test_nothing_that_parses_is_deeper_than_the_check_says(text):
    """By brute force: the parsed tables of texts that pass are no deeper than the bound, the outermost one apart."""
    try:
        table = texts.parse_toml(text, "here")
    except ConfigError:
        return
    texts_depth = min(depth for depth in range(80) if not _too_deep(text, depth))
    assert _nested(table) <= texts_depth + 1


def _too_deep(text: str, depth: int) -> bool:
    before, texts.MAX_DEPTH = texts.MAX_DEPTH, depth
    try:
        return texts._is_too_deep(text)
    finally:
        texts.MAX_DEPTH = before


@pytest.mark.parametrize(
    ("names", "key"),
    [
        (["streams", "brain-mr", "shape"], "streams.brain-mr.shape"),
        (["streams", "brain-mr.t1"], 'streams."brain-mr.t1"'),
    ],
)
def test_a_name_with_a_dot_is_quoted_in_a_dotted_key(names, key):
    assert texts.toml_key(*names) == key
    assert toml_names(f" {key} ") == names


@pytest.mark.parametrize("key", ["", "a", "a..b", ".", "stream:brain-mr.mean", "a. b"])
def test_a_key_without_quotes_is_cut_at_every_dot(key):
    assert toml_names(key) == key.strip().split(".")
