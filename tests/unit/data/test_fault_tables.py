"""Kind 12: separators, encodings and decimal commas in tables."""

import codecs
from pathlib import Path

import pytest

from panfm.data.label_kinds import infer_kinds
from panfm.data.labels import LabelTable, read_label_table
from panfm.data.tables import read_table
from panfm.errors import DataError

ROWS = [["subject", "stream", "path"], ["a", "brain-mr", "x.nii"], ["b", "brain-mr", "y.nii"]]
NEEDED = ("subject", "stream", "path")
SEPARATORS = {";": "semicolons", "\t": "tabs", "|": "bars", ":": "colons"}


def text_of(separator=",", quote="", end="\n"):
    return end.join(separator.join(f"{quote}{cell}{quote}" for cell in row) for row in ROWS) + end


def told(tmp_path, content, needed=NEEDED):
    path = tmp_path / "table.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError) as caught:
        read_table(path, needed)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", [b"", codecs.BOM_UTF8])
@pytest.mark.parametrize("quote", ["", '"'])
def test_commas_are_read(tmp_path, end, mark, quote):
    (tmp_path / "table.csv").write_bytes(mark + text_of(quote=quote, end=end).encode())
    columns, lines = read_table(tmp_path / "table.csv", NEEDED)
    assert columns == ROWS[0]
    assert [list(cells.values()) for _, cells in lines] == ROWS[1:]


@pytest.mark.parametrize("separator", SEPARATORS)
@pytest.mark.parametrize("mark", [b"", codecs.BOM_UTF8])
@pytest.mark.parametrize("quote", ["", '"'])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_another_separator_is_named(tmp_path, separator, mark, quote, end):
    content = mark + text_of(separator, quote, end).encode()
    assert f"(cells separated by {SEPARATORS[separator]}; save it with commas" in told(tmp_path, content)


def test_a_line_for_excel_is_named(tmp_path):
    assert "(cells separated by semicolons; " in told(tmp_path, "sep=;\n" + text_of(";"))


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ('subject,stream,path\n"a,brain-mr,x\n', "no UTF-8 CSV file (unexpected end of data)"),
        (
            f"subject,stream,path\na,brain-mr,{'x' * 200_000}\n",
            "no UTF-8 CSV file (field larger than field limit (131072))",
        ),
        ("subject,stream,path,\na,brain-mr,x,\n", "no name over column 4 of 4 (a column too many?)"),
        (",subject,stream,path\n0,a,brain-mr,x\n", "no name over column 1 of 4 (a column too many?)"),
    ],
    ids=["a quote that is not closed", "a long cell", "a comma at the end", "an index of pandas"],
)
@pytest.mark.parametrize("needed", [(), NEEDED])
def test_no_separator_is_named_where_it_is_not_at_fault(tmp_path, content, complaint, needed):
    assert told(tmp_path, content, needed) == complaint


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("mark", [True, False])
@pytest.mark.parametrize("separator", [",", "\t"])
def test_utf_16_is_named(tmp_path, encoding, mark, separator):
    start = codecs.BOM_UTF16_LE if encoding == "utf-16-le" and mark else b""
    start = codecs.BOM_UTF16_BE if encoding == "utf-16-be" and mark else start
    assert "it is UTF-16; save it as CSV UTF-8" in told(tmp_path, start + text_of(separator).encode(encoding))


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252", "mac-roman"])
def test_another_encoding_is_named_with_its_line(tmp_path, encoding):
    content = "subject,stream,path\na,brain-mr,x\nM\u00fcller,brain-mr,y\n".encode(encoding)
    assert "on line 3; save it as CSV UTF-8)" in told(tmp_path, content)


@pytest.mark.parametrize(
    ("table", "complaint"),
    [
        (
            "subject;age\na;61,5\n",
            "no column subject (cells separated by semicolons; save it with commas, and points in",
        ),
        (
            'subject,age\na,"61,5"\n',
            "labels.csv:2: age: found '61,5', expected a number or nothing (with a decimal point)",
        ),
        (
            "subject,age\na,61,5\n",
            "3 cells on line 2 under 2 columns (a comma in a number, or in a text without quotes?)",
        ),
        ('subject,age\na,"1.234,5"\n', "(with a decimal point)"),
        ('subject,age\na,"1,234.5"\n', "(with a decimal point)"),
        ("subject,age\na,1_000\n", "found '1_000', expected a number or nothing"),
        ("subject,age\na,61.5 kg\n", "found '61.5 kg', expected a number or nothing"),
        ("subject,age\na\n", "1 cells on line 2 under 2 columns"),
    ],
)
def test_numbers_of_labels(tmp_path, table, complaint):
    (tmp_path / "labels.csv").write_text(table)
    with pytest.raises(DataError) as caught:
        read_label_table(tmp_path / "labels.csv")
    assert complaint in str(caught.value)


@pytest.mark.parametrize("number", ["61.5", "-1e3", " 7 ", "0.5"])
def test_numbers_with_points_are_read(tmp_path, number):
    (tmp_path / "labels.csv").write_text(f"subject,age\na,{number}\n")
    assert read_label_table(tmp_path / "labels.csv").values.tolist() == [[float(number)]]


def test_the_check_names_the_manifest(site):
    site.add("a")
    manifest = site.folder / "manifest.csv"
    manifest.write_text(manifest.read_text().replace(",", ";"))
    site.assert_one_fault("manifest.csv: found no column subject, stream, path (cells separated by semicolons; ")


MARKED = "with commas or other marks, e.g. {}; left out: write them with a point and no other mark, as 1234.5"


@pytest.mark.parametrize(
    ("cells", "kind", "note"),
    [
        (["1,5", "2,5", "3,5"], "ignore", f"3 numbers {MARKED.format(repr('1,5'))}"),
        (["1.5", "2", "3,5", "4"], "ignore", f"1 number {MARKED.format(repr('3,5'))}"),
        (["1_000", "2000", "3000"], "ignore", MARKED.format(repr("1_000"))),
        (["1'000", "2000", "3000"], "ignore", "1 number with commas or other marks"),
        (["1,234.5", "20", "30"], "ignore", MARKED.format(repr("1,234.5"))),
        (["1 234", "20", "30"], "ignore", MARKED.format(repr("1 234"))),
        (
            ["=1+1", "2", "3"],
            "ignore",
            "1 formula of a spreadsheet, e.g. '=1+1'; left out: save their values, or write",
        ),
        (["#REF!", "a", "b", "a", "b"], "ignore", "1 formula of a spreadsheet, e.g. '#ref!'"),
        (["#DIV/0!", "1.5", "2.5"], "ignore", "1 formula of a spreadsheet, e.g. '#div/0!'"),
        (["#N/A", "1.5", "2.5"], "number", ""),
        (["44197", "44198", "45000"], "number", "whole numbers of 44197 to 45000: dates of a spreadsheet?"),
        (["44197", "44198.5"], "number", ""),
        (["\u200b1", "0", "1\ufeff"], "yes-no", ""),
        (["\u200bYes", "no", "yes\u00ad"], "yes-no", ""),
        (["IIa", "IIb", "IIa", "IIb", "III", "III"], "classes", "classes iia, iib, iii"),
    ],
)
def test_cells_as_spreadsheets_write_them(cells, kind, note):
    subjects = tuple(f"s{number}" for number in range(len(cells)))
    table = LabelTable(Path("labels.csv"), subjects, (2,) * len(cells), {"column": tuple(cells)})
    kinds = infer_kinds([table], {})
    assert kinds.by_column["column"].kind == kind
    assert (note in kinds.notes[0]) if note else kinds.notes == ()
