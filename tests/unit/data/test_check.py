"""Broken manifests and descriptions, quarantine and coverage, through the command a site operator types."""

import os

import numpy as np
import pytest

from panfm.data.check import check_site
from panfm.data.manifest import QUARANTINE

BAD_ROWS = {
    "same subject and stream": (
        ["a,brain-mr,x.nii.gz,,"],
        "manifest.csv:3: found subject 'a' with brain-mr again (line 2)",
    ),
    "same file": (["b,brain-mr,a_brain-mr.nii.gz,,"], "manifest.csv:3: found file 'a_brain-mr.nii.gz' again (line 2)"),
    "same file, otherwise spelled": (["b,brain-mr,./x/../a_brain-mr.nii.gz,,"], "again (line 2)"),
    "unknown modality": (["b,brain-xx,b.nii.gz,,"], "manifest.csv:3: found unknown stream 'brain-xx'"),
    "unknown stream": (["b,Brain MR,b.nii.gz,,"], "manifest.csv:3: found unknown stream 'Brain MR'"),
    "no subject": ([",brain-mr,b.nii.gz,,"], "manifest.csv:3: found no subject"),
    "no path": (["b,brain-mr,,,"], "manifest.csv:3: found no path"),
    "two splits": (["a,heart-mr,b.nii.gz,val,"], "manifest.csv:3: found subject 'a' in split val and in train"),
    "unknown split": (["b,brain-mr,b.nii.gz,dev,"], "manifest.csv:3: found split 'dev', expected train or val or test"),
    "null byte": (["b,brain-mr,\0,,"], "\\x00: found a path that cannot be read"),
    "what steers a terminal": (["b,brain-mr,\x1b[2Jb.nii,,"], "\\x1b[2Jb.nii: found no such file"),
}

BAD_TABLES = {
    "absent": (None, "manifest.csv: found no such file"),
    "no rows": ("subject,stream,path\n", "manifest.csv: found no rows"),
    "nothing": ("", "manifest.csv: found no column subject, stream, path"),
    "semicolons": ("subject;stream;path\na;brain-mr;x\n", "manifest.csv: found no column subject, stream, path"),
    "typo in a column": ("subject,stream,path,splt\na,brain-mr,x,val\n", "manifest.csv: found unknown column 'splt'"),
    "column twice": ("subject,stream,path,path\na,brain-mr,x,y\n", "manifest.csv: found column 'path' twice"),
    "comma in a path": ("subject,stream,path\na,brain-mr,x,y\n", "manifest.csv: found 4 cells on line 2"),
    "no text": (b"\xff\xfe\x00\x01", "manifest.csv: found no UTF-8 CSV file"),
    "endless cell": (
        f"subject,stream,path\n{'x' * 200_000},brain-mr,x\n",
        "found no UTF-8 CSV file (field larger than",
    ),
    "open quote": ('subject,stream,path\n"a,brain-mr,x\n', "manifest.csv: found no UTF-8 CSV file"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_bad_row(site, name):
    lines, text = BAD_ROWS[name]
    site.add("a")
    site.lines += lines
    site.write()
    site.assert_one_fault(text)
    site.assert_quarantine_leaves_one_row()


@pytest.mark.parametrize("name", BAD_TABLES)
def test_bad_table(site, name):
    content, text = BAD_TABLES[name]
    manifest = site.write() / "manifest.csv"
    manifest.unlink()
    if content is not None:
        manifest.write_bytes(content if isinstance(content, bytes) else content.encode())
    site.assert_one_fault(text)
    result = site.check("--quarantine")  # nothing is left to go on with
    assert result.exit_code == 1
    assert not (site.folder / QUARANTINE).exists()


@pytest.mark.parametrize(
    "text", [None, "name = ", 'nam = "x"', 'name = "Not A Name"', 'name = "a"\nmanifest = "\\u0000x"']
)
def test_bad_site_description(site, text):
    site.add("a")
    description = site.folder / "site.toml"
    description.unlink() if text is None else description.write_text(text)
    result = site.check()
    assert result.exit_code == 1
    assert all(line.startswith(str(description)) for line in result.stderr.splitlines())


def test_manifest_that_is_a_circle_of_links(site):
    site.add("a")
    (site.folder / "manifest.csv").unlink()
    (site.folder / "manifest.csv").symlink_to(site.folder / "manifest.csv")
    site.assert_one_fault("manifest.csv: found no UTF-8 CSV file (OSError)")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_unreadable_file(site):
    site.add("a")
    (site.folder / "a_brain-mr.nii.gz").chmod(0)
    site.assert_one_fault("PermissionError")


RUN = """
name = "run"
organs = ["brain", "heart"]
[streams]
brain-mr = { shape = [8, 8, 8], patch = [4, 4, 4], spacing-mm = [2.0, 2.0, 2.0] }
heart-xray = { shape = [8, 8], patch = [4, 4] }
"""


def test_against_a_run(site, tmp_path):
    run = tmp_path / "run.toml"
    run.write_text(RUN)
    site.add("a")
    site.add("a", "heart-mr")
    result = site.check("--run", str(run))
    assert result.exit_code == 0
    assert "heart-mr (not in this run)" in result.output
    site.add("a", "toe-mr")
    site.assert_one_fault("found unknown stream 'toe-mr', expected an organ of brain, heart", "--run", str(run))
    assert site.check().exit_code == 0


def test_the_run_decides_what_is_a_volume(site, streams, tmp_path):
    run = tmp_path / "run.toml"
    run.write_text(RUN)
    site.add("a")
    site.row("a", "heart-xray", "scan.nii.gz")
    site.nifti("scan.nii.gz", np.ones((4, 4, 4), np.int16))
    site.assert_one_fault("scan.nii.gz: found a volume, expected a picture", "--run", str(run))


def test_repaired_image_stays_out_until_the_quarantine_is_written_anew(site):
    site.add("sound")
    site.add("broken")
    (site.folder / "broken_brain-mr.nii.gz").unlink()
    site.check("--quarantine")
    site.nifti("broken_brain-mr.nii.gz", np.ones((4, 4, 4), np.int16))
    result = site.check()
    assert result.exit_code == 0
    assert "quarantine.csv: 1 rows are left out of every run" in result.output
    assert "0 rows left out, 2 stay" in site.check("--quarantine").output
    assert "quarantine.csv" not in site.check().output


def test_quarantine_that_cannot_be_written(site):
    site.add("a")
    (site.folder / QUARANTINE).mkdir()
    result = site.check("--quarantine")
    assert result.exit_code == 1
    assert len(result.stderr.splitlines()) == 1


def test_coverage_and_progress(site):
    for index, split in enumerate(["train", "train", "val", "test"]):
        site.add(f"s{index}", split=split)
    site.add("s0", "heart-mr")
    steps = []
    report = check_site(site.folder, progress=lambda *step: steps.append(step))
    assert report.coverage == {
        ("brain-mr", "train"): 2, ("brain-mr", "val"): 1, ("brain-mr", "test"): 1, ("heart-mr", "train"): 1,
    }  # fmt: skip
    assert report.faults == ()
    assert steps == [(done, 5) for done in range(1, 6)]


def test_every_fault_is_listed_and_an_excel_table_is_read(site):
    for subject in "abcd":
        site.add(subject)
    (site.folder / "b_brain-mr.nii.gz").unlink()
    (site.folder / "d_brain-mr.nii.gz").write_text("")
    manifest = site.folder / "manifest.csv"
    manifest.write_bytes(b"\xef\xbb\xbf" + manifest.read_text().replace("\n", "\r\n").encode() + b"\r\n")
    assert [line.split(":")[0] for line in site.faults()] == ["b_brain-mr.nii.gz", "d_brain-mr.nii.gz"]


def test_a_subject_with_two_sessions_counts_once(site):
    site.header = "subject,stream,path,session"
    for session in ("1", "2"):
        site.nifti(f"{session}.nii.gz", np.random.default_rng(int(session)).integers(0, 99, (4, 4, 4)).astype(np.int16))
        site.lines.append(f"a,brain-mr,{session}.nii.gz,{session}")
    assert check_site(site.write()).coverage == {("brain-mr", "train"): 1}
