from pathlib import Path

import numpy as np
import pytest

from panfm.data.label_kinds import LabelRule, encode, infer_kinds, read_rules
from panfm.data.labels import LabelTable, read_cells
from panfm.errors import ConfigError, DataError


def table(name="labels.csv", **columns):
    cells = {column: tuple(map(str, values)) for column, values in columns.items()}
    count = len(next(iter(cells.values())))
    return LabelTable(Path(name), tuple(f"s{i}" for i in range(count)), tuple(range(2, count + 2)), cells)


def kind_of(*cells, **rule):
    kinds = infer_kinds([table(x=cells)], {"x": LabelRule(**rule)} if rule else {})
    return kinds.by_column["x"].kind, kinds.by_column["x"].values, " ".join(kinds.notes)


@pytest.mark.parametrize(
    ("cells", "kind", "values", "note"),
    [
        ("0 1 0 1", "yes-no", ("0", "1"), ""),
        ("0 1.0 0.0 1", "yes-no", ("0", "1"), ""),
        ("no yes Yes NO", "yes-no", ("no", "yes"), ""),
        ("true false", "yes-no", ("false", "true"), ""),
        ("positive negative", "yes-no", ("negative", "positive"), ""),
        ("M F M", "yes-no", ("f", "m"), 'x: f is read as 0, m as 1; the other way round, labels.toml: [x] yes = "f"'),
        ("1 2 1", "yes-no", ("1", "2"), 'x: 1 is read as 0, 2 as 1; the other way round, labels.toml: [x] yes = "1"'),
        ("-1 1 1", "yes-no", ("-1", "1"), ""),
        ("low mid high low mid high", "classes", ("high", "low", "mid"), "x: classes high, low, mid, each probed"),
        ("20.5 31 44.25", "number", (), ""),
        ("-1.5 -1 2", "number", (), ""),
        ("0 1 2", "number", (), 'read as a number; if they are names, labels.toml: [x] kind = "classes"'),
        ("0 1 9", "ignore", (), '1 subject with 9, far from the others (0 to 1): not known?'),
        ("0 1 -1", "ignore", (), 'left out until labels.toml says: [x] unknown = ["-1"], or unknown = []'),
        ("61 54 -999 -999", "ignore", (), "2 subjects with -999, far from the others (54 to 61)"),
        ("61 54 999", "ignore", (), "far from the others"),
        ("0 1 -1 -999 9", "ignore", (), "3 subjects with -1, -999, 9, far from the others (0 to 1)"),
        ("0 1 -1 -999 9", "ignore", (), 'labels.toml says: [x] unknown = ["-1", "-999", "9"], or unknown = []'),
        ("-9 99", "ignore", (), "1 subject with -9, far from the others (99 to 99)"),
        ("90 84 99", "number", (), ""),
        ("61 54 <5", "ignore", (), "1 cell without a number, e.g. '<5'; left out until"),
        ("61 54 NA nan ?", "number", (), ""),
        ("7 7 7", "ignore", (), "all subjects have '7', left out"),
        ("? ? ?", "ignore", (), "no subject has a value, left out"),
        ("a b c d", "ignore", (), "4 different texts, left out"),
        ("12% 13% 14%", "ignore", (), "numbers with a unit, e.g. '12%'; left out: write the numbers alone"),
        ("61kg 54 72.5kg", "ignore", (), "numbers with a unit, e.g. '61kg'"),
        ("1a 1b 2a 1a 1b 2a", "classes", ("1a", "1b", "2a"), "x: classes 1a, 1b, 2a"),
        ("2020-01-31 2021-02-03 2020-01-31", "ignore", (), "dates, e.g. '2020-01-31'; left out"),
        ("31.1.2020 3.2.2021 3.2.2021", "ignore", (), "dates, e.g. '31.1.2020'"),
        ("M F 0 1", "ignore", (), "words and numbers (0, 1, f, m); left out: write one coding at all places"),
    ],
)  # fmt: skip
def test_a_kind_is_told_by_the_values(cells, kind, values, note):
    told = kind_of(*cells.split())
    assert told[:2] == (kind, values)
    assert note in told[2]
    assert bool(note) == bool(told[2])


@pytest.mark.parametrize(
    ("cells", "rule", "kind", "values"),
    [
        ("0 1 9", {"unknown": ("9",)}, "yes-no", ("0", "1")),
        ("0 1 9", {"unknown": ()}, "number", ()),
        ("-999 54 61", {"unknown": ("-999.0",)}, "number", ()),
        ("0 1 2", {"kind": "classes"}, "classes", ("0", "1", "2")),
        ("M F", {"yes": "f"}, "yes-no", ("m", "f")),
        ("0 1", {"kind": "ignore"}, "ignore", ()),
        ("a b c d", {"kind": "classes"}, "classes", ("a", "b", "c", "d")),
        ("M F X", {"unknown": ("x",), "yes": "M"}, "yes-no", ("f", "m")),
    ],
)
def test_a_rule_overrules(cells, rule, kind, values):
    assert kind_of(*cells.split(), **rule)[:2] == (kind, values)


@pytest.mark.parametrize(
    ("cells", "rule", "why"),
    [
        (
            "0 1 2",
            {"kind": "yes-no"},
            r'labels.toml: x: found 3 values \(0, 1, 2\), expected two; write kind = "classes"',
        ),
        ("M F", {"yes": "x"}, "labels.toml: x: yes = 'x': no subject has it, expected m, f"),
    ],
)
def test_a_rule_that_does_not_go_with_the_values_is_one_line(cells, rule, why):
    with pytest.raises(ConfigError, match=why):
        kind_of(*cells.split(), **rule)


def test_a_further_code_is_asked_about_beside_those_that_are_known():
    assert '[x] unknown = ["-1", "9"], or' in kind_of("0", "1", "2", "-1", "9", unknown=("-1",))[2]


def test_a_rule_for_a_column_that_is_not_there():
    with pytest.raises(ConfigError, match=r"labels.toml: y: no label table has this column, known: x"):
        infer_kinds([table(x=(0, 1))], {"y": LabelRule()})


def test_kinds_are_of_all_places_together():
    """A site of men, and one of women; a grade that one site lacks."""
    places = [table(sex="MM", grade=("i", "ii")), table(sex="FF", grade=("iii", "i")), table(grade=("ii", "iii"))]
    kinds = infer_kinds(places, {}).by_column
    assert (kinds["sex"].values, kinds["grade"].values) == (("f", "m"), ("i", "ii", "iii"))
    labels = encode(places[1], kinds)
    assert labels.names == ("sex", "grade=i", "grade=ii", "grade=iii")
    np.testing.assert_array_equal(labels.values, [[0, 0, 0, 1], [0, 1, 0, 0]])
    assert np.isnan(encode(places[2], kinds).values[:, 0]).all()


def test_numbers_stay_and_unknown_is_nan():
    labels = encode(table(age=(61.5, "", -999), sick=("yes", "na", "no")), infer_kinds(
        [table(age=(61.5, 20, -999), sick=("yes", "na", "no"))], {"age": LabelRule(unknown=("-999",))}
    ).by_column)  # fmt: skip
    np.testing.assert_array_equal(labels.values, [[61.5, 1], [np.nan, np.nan], [np.nan, 0]])


def test_a_cell_that_is_none_of_the_values_is_named():
    kinds = infer_kinds([table(sex="MF")], {}).by_column
    with pytest.raises(DataError, match=r"labels.csv:3: sex: found 'X', expected f, m or nothing"):
        encode(table(sex="MX"), kinds)


def test_notes_print_nothing_that_steers_a_terminal():
    assert "\x1b" not in kind_of("\x1b[31m", "b")[2]


def test_rules_are_read_beside_the_tables(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "labels.csv").write_text("subject,age\nx,-9\n")
    tables = [read_cells(tmp_path / name / "labels.csv") for name in ("a", "b")]
    assert read_rules(tables) == {}
    (tmp_path / "a" / "labels.toml").write_text('[age]\nunknown = ["-9"]\n')
    assert read_rules(tables) == {"age": LabelRule(unknown=("-9",))}
    (tmp_path / "b" / "labels.toml").write_text("[age]\nunknown = []\n")
    with pytest.raises(ConfigError, match=r"b/labels.toml: age: differs from another place's"):
        read_rules(tables)
    (tmp_path / "b" / "labels.toml").write_text('[age]\nkind = "colour"\n')
    with pytest.raises(ConfigError, match=r"b/labels.toml: age.kind: found 'colour', expected one of yes-no"):
        read_rules(tables)
