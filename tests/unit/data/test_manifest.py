import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from panfm.config import load_site
from panfm.data.left_out import Listed, read_quarantine
from panfm.data.manifest import QUARANTINE, Fault, Row, read_manifest, scan_manifest
from panfm.data.quarantine import write_quarantine
from panfm.errors import DataError


def rows_of(site):
    return read_manifest(site.folder, load_site(site.folder))


def test_rows_keep_their_order_and_lines(site):
    site.row("b", split="val", mask="m.nii.gz")
    site.lines.append("")
    site.row("a", path=" x.nii.gz ")
    assert rows_of(site) == (
        Row(2, "b", "brain-mr", "b_brain-mr.nii.gz", "val", "m.nii.gz"),
        Row(4, "a", "brain-mr", "x.nii.gz", "train", ""),
    )


def test_optional_columns_may_be_absent(site):
    site.header = "path,subject,stream"
    site.lines = ["x.nii.gz,a,brain-mr"]
    site.write()
    assert rows_of(site) == (Row(2, "a", "brain-mr", "x.nii.gz"),)


def test_every_fault_has_file_and_line(site):
    site.lines = ["a,brain-mr,x,,", "a,brain-mr,y,,", ",brain-mr,z,,", "b,brain-mr,w,,"]
    with pytest.raises(DataError) as caught:
        rows_of(site.__class__(site.write(), lines=site.lines))
    places = [line.split(" ")[0] for line in str(caught.value).splitlines()]
    assert places == [f"{site.folder}/manifest.csv:{number}:" for number in (3, 4)]


def test_many_faults_are_counted(site):
    site.lines = [f"a{number},brain-mr,{number},Train," for number in range(12)]
    with pytest.raises(DataError) as caught:
        rows_of(site.__class__(site.write(), lines=site.lines))
    lines = str(caught.value).splitlines()
    assert (len(lines), lines[-1]) == (11, f"and 2 more; panfm site check {site.folder}")


def test_quarantined_rows_are_left_out_before_rows_are_compared(site):
    site.row("a", path="x")
    site.row("a", path="x")
    (fault,) = scan_manifest(site.folder, load_site(site.folder))[1]
    write_quarantine(site.folder, [fault])
    assert read_quarantine(site.folder / QUARANTINE) == (Listed("a", "brain-mr", "x", 2, ""),)
    assert [row.line for row in rows_of(site)] == [2]


def test_quarantine_of_a_manifest_with_more_rows_holds(site):
    site.row("a")
    site.row("a")
    (fault,) = scan_manifest(site.folder, load_site(site.folder))[1]
    write_quarantine(site.folder, [fault])
    site.lines[:0] = [f"new{index},brain-mr,new{index}.nii.gz,," for index in range(2)]
    site.write()
    assert [row.line for row in rows_of(site)] == [2, 3, 4]


def test_quarantine_is_written_anew(site):
    site.row("a")
    write_quarantine(site.folder, [Fault("f", "x", "y", Row(2, "a", "brain-mr", 'odd, "name"\n'))])
    assert len(read_quarantine(site.folder / QUARANTINE)) == 1
    write_quarantine(site.folder, [])
    assert read_quarantine(site.folder / QUARANTINE) == ()


@pytest.mark.parametrize("text", ["", "line,subject\n", "line,subject,stream,path,reason\nx,a,b,c,d\n"])
def test_broken_quarantine_is_not_ignored(site, text):
    site.row("a")
    (site.folder / QUARANTINE).write_text(text)
    with pytest.raises(DataError, match=r"quarantine\.csv: not a quarantine list"):
        rows_of(site)


@settings(max_examples=150)
@given(st.binary(max_size=200) | st.text('ab,-/"\n;.\0 mrx0', max_size=60).map(lambda text: text.encode()))
def test_any_table_is_read_or_refused_in_one_line_per_fault(site, content):
    manifest = site.write() / "manifest.csv"
    manifest.write_bytes(b"subject,stream,path\n" + content)
    rows, faults = scan_manifest(site.folder, load_site(site.folder))
    assert rows or faults
    assert all(len(str(fault).splitlines()) == 1 for fault in faults)


def test_a_session_is_a_row_of_its_own_and_a_repeated_row_says_what_to_write(site):
    site.header = "subject,session,stream,path"
    site.lines = ["a,2,brain-mr,x", "a,1,brain-mr,y", "a,1,brain-mr.t1,z"]
    site.write()
    assert [(row.session, row.stream) for row in rows_of(site)] == [
        ("2", "brain-mr"),
        ("1", "brain-mr"),
        ("1", "brain-mr.t1"),
    ]
    site.lines.append("a,1,brain-mr,w")
    site.write()
    (fault,) = scan_manifest(site.folder, load_site(site.folder))[1]
    assert str(fault) == (
        "manifest.csv:5: found subject 'a' with brain-mr again (line 3), expected one row per subject and stream; a "
        "column session for a further visit, or a suffix as in brain-mr.t1 for another kind of image"
    )


def test_sessions_of_a_subject_are_in_one_split(site):
    site.header = "subject,session,stream,path,split"
    site.lines = ["a,1,brain-mr,x,train", "a,2,brain-mr,y,test"]
    site.write()
    with pytest.raises(DataError, match="subject 'a' in split test and in train"):
        rows_of(site)
