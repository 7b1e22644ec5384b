"""Broken inputs, one by one, through the command a site operator types."""

import gzip
import os
import struct

import nibabel as nib
import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from panfm.cli import main
from panfm.data.check import check_site
from panfm.data.manifest import QUARANTINE


def bad_image(make):
    """A case that adds one sound subject and one whose image `make(site, path)` breaks."""

    def build(site):
        site.add("sound")
        site.add("broken")
        make(site, site.folder / "broken_brain-mr.nii.gz")

    return build


def header_of(voxels=None, affine=None, **fields):
    def make(site, path):
        image = nib.Nifti1Image(np.zeros((3, 3, 3), np.int16) if voxels is None else voxels, None)
        image.header.set_sform(np.eye(4) if affine is None else affine, code=1)
        for name, value in fields.items():
            image.header[name] = value
        nib.save(image, path)

    return make


def with_bytes(change):
    return lambda site, path: path.write_bytes(change(path.read_bytes()))


def patched(offset, layout, *values):
    """Overwrite header bytes, past whatever a library would allow."""

    def change(content):
        raw = bytearray(gzip.decompress(content))
        struct.pack_into(layout, raw, offset, *values)
        return gzip.compress(bytes(raw))

    return with_bytes(change)


def nan_voxels(value):
    voxels = np.ones((4, 4, 4), np.float32)
    voxels[1, 2, 3] = value
    return header_of(voxels)


def two_orientations(site, path):
    image = nib.Nifti1Image(np.zeros((3, 3, 3), np.int16), None)
    image.header.set_sform(np.eye(4), code=1)
    image.header.set_qform(np.diag([-1.0, 1.0, 1.0, 1.0]), code=1)
    nib.save(image, path)


def broken_qform(quaternion):
    return header_of(qform_code=1, quatern_b=quaternion)


BAD_IMAGES = {
    "truncated gzip": (with_bytes(lambda content: content[: len(content) // 2]), "broken gzip"),
    "gzip without its checksum": (with_bytes(lambda content: content[:-4]), "broken gzip"),
    "flipped bit": (with_bytes(lambda c: c[:-30] + bytes([c[-30] ^ 4]) + c[-29:]), "broken gzip"),
    "gzip of half a file": (
        with_bytes(lambda c: gzip.compress(gzip.decompress(c)[:600])),
        "voxels that cannot be read",
    ),
    "text": (lambda site, path: path.write_text("I am no image\n"), "no NIfTI header"),
    "empty": (lambda site, path: path.write_bytes(b""), "no NIfTI header"),
    "folder": (lambda site, path: (path.unlink(), path.mkdir()), "cannot be read"),
    "absent": (lambda site, path: path.unlink(), "no such file"),
    "2D": (header_of(np.zeros((4, 5), np.int16)), "2D of shape 4x5"),
    "4D": (header_of(np.zeros((4, 4, 4, 3), np.int16)), "4D of shape 4x4x4x3"),
    "no voxels": (patched(40, "<8h", 3, 0, 4, 4, 1, 1, 1, 1), "0x4x4"),
    "negative size": (patched(40, "<8h", 3, -4, 4, 4, 1, 1, 1, 1), "found"),
    "huge size": (patched(40, "<8h", 3, 32767, 32767, 32767, 1, 1, 1, 1), "voxels that cannot be read"),
    "unknown type": (patched(70, "<h", 999), "found"),
    "complex": (header_of(np.zeros((3, 3, 3), np.complex64)), "complex64"),
    "colour": (header_of(np.zeros((3, 3, 3), [("R", "u1"), ("G", "u1"), ("B", "u1")])), "voxels of type"),
    "NaN": (nan_voxels(np.nan), "1 voxels that are NaN or infinite"),
    "infinite": (nan_voxels(np.inf), "1 voxels that are NaN or infinite"),
    "too large for float32": (header_of(np.full((2, 2, 2), 1e300)), "8 voxels that are NaN or infinite"),
    "singular affine": (header_of(affine=np.diag([1.0, 1.0, 0.0, 1.0])), "singular affine"),
    "affine of zeros": (patched(280, "<12f", *([0.0] * 12)), "singular affine"),
    "NaN affine": (patched(280, "<f", float("nan")), "singular affine"),
    "no orientation": (header_of(sform_code=0, qform_code=0), "no orientation"),
    "two orientations": (two_orientations, "two orientations (sform RAS, qform LAS)"),
    "impossible qform beside a good sform": (broken_qform(2.0), "a broken qform (w2 should be positive"),
    "NaN qform beside a good sform": (broken_qform(np.nan), "a broken qform"),
    "voxels of a metre": (header_of(affine=np.diag([1.0, 1.0, 1000.0, 1.0])), "voxels of 1 x 1 x 1000 mm"),
    "voxels of a nanometre": (header_of(affine=np.diag([1e-6, 1.0, 1.0, 1.0])), "voxels of 1e-06 x 1 x 1 mm"),
    "copy of another": (
        lambda s, p: p.write_bytes((s.folder / "sound_brain-mr.nii.gz").read_bytes()),
        "same content as",
    ),
}


def with_mask(name, make):
    def build(site):
        site.add("sound")
        site.add("broken", mask=name)
        make(site)

    return build


BAD_MASKS = {
    "absent mask": (with_mask("mask.nii.gz", lambda site: None), "mask.nii.gz: found no such file"),
    "empty mask": (
        with_mask("mask.nii.gz", lambda site: site.nifti("mask.nii.gz", np.zeros((9, 8, 7), np.uint8))),
        "mask.nii.gz: found an empty mask",
    ),
    "mask of another shape": (
        with_mask("mask.nii.gz", lambda site: site.nifti("mask.nii.gz", np.ones((9, 8, 6), np.uint8))),
        "mask.nii.gz: found a mask of shape 9x8x6, expected 9x8x7",
    ),
}

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
    "null byte": (["b,brain-mr,\0,,"], "found a path that cannot be read"),
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
    "open quote": ('subject,stream,path\n"a,brain-mr,x\n', "manifest.csv: found no UTF-8 CSV file"),
}


def check(site, *options):
    result = CliRunner().invoke(main, ["site", "check", str(site.folder), *options])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert "Traceback" not in result.output
    return result


def faults(result):
    return [line for line in result.output.splitlines() if ": found " in line]


def assert_one_fault(result, text):
    assert result.exit_code == 1
    (line,) = faults(result)
    assert text in line
    assert ", expected " in line


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_bad_image(site, name, capfd):
    make, text = BAD_IMAGES[name]
    bad_image(make)(site)
    result = check(site)
    assert_one_fault(result, text)
    assert faults(result)[0].startswith("broken_brain-mr.nii.gz: ")
    assert capfd.readouterr() == ("", "")  # no library talks past us
    assert_quarantine_leaves_the_sound_subject(site)


@pytest.mark.parametrize("name", BAD_MASKS)
def test_bad_mask(site, name):
    build, text = BAD_MASKS[name]
    build(site)
    assert_one_fault(check(site), text)
    assert_quarantine_leaves_the_sound_subject(site)


@pytest.mark.parametrize("name", BAD_ROWS)
def test_bad_row(site, name):
    lines, text = BAD_ROWS[name]
    site.add("a")
    site.lines += lines
    site.write()
    assert_one_fault(check(site), text)
    assert_quarantine_leaves_the_sound_subject(site)


def assert_quarantine_leaves_the_sound_subject(site):
    result = check(site, "--quarantine")
    assert result.exit_code == 0
    assert len(faults(result)) == 1
    assert "1 rows left out, 1 stay" in result.output
    assert len((site.folder / QUARANTINE).read_text().splitlines()) == 2
    assert check(site).exit_code == 1  # the check itself goes on seeing the fault


@pytest.mark.parametrize("name", BAD_TABLES)
def test_bad_table(site, name):
    content, text = BAD_TABLES[name]
    manifest = site.write() / "manifest.csv"
    manifest.unlink()
    if content is not None:
        manifest.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert_one_fault(check(site), text)
    result = check(site, "--quarantine")  # nothing is left to go on with
    assert result.exit_code == 1
    assert not (site.folder / QUARANTINE).exists()


@pytest.mark.parametrize(
    "text", [None, "name = ", 'nam = "x"', 'name = "Not A Name"', 'name = "a"\nmanifest = "\\u0000x"']
)
def test_bad_site_description(site, text):
    site.add("a")
    description = site.folder / "site.toml"
    description.unlink() if text is None else description.write_text(text)
    result = check(site)
    assert result.exit_code == 1
    assert all(line.startswith(str(description)) for line in result.stderr.splitlines())


def test_manifest_that_is_a_circle_of_links(site):
    site.add("a")
    (site.folder / "manifest.csv").unlink()
    (site.folder / "manifest.csv").symlink_to(site.folder / "manifest.csv")
    assert_one_fault(check(site), "manifest.csv: found no UTF-8 CSV file (OSError)")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_unreadable_file(site):
    site.add("a")
    (site.folder / "a_brain-mr.nii.gz").chmod(0)
    assert_one_fault(check(site), "PermissionError")


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
    result = check(site, "--run", str(run))
    assert result.exit_code == 0
    assert "heart-mr (not in this run)" in result.output
    site.add("a", "toe-mr")
    assert_one_fault(check(site, "--run", str(run)), "found unknown stream 'toe-mr', expected an organ of brain, heart")
    assert check(site).exit_code == 0


def test_the_run_decides_what_is_a_volume(site, streams, tmp_path):
    run = tmp_path / "run.toml"
    run.write_text(RUN)
    site.add("a")
    site.row("a", "heart-xray", "scan.nii.gz")
    site.nifti("scan.nii.gz", np.ones((4, 4, 4), np.int16))
    assert_one_fault(check(site, "--run", str(run)), "scan.nii.gz: found no readable picture")


@pytest.mark.parametrize("mode", ["I;16", "F"])
def test_deep_picture(site, mode):
    Image.fromarray(np.zeros((5, 4), np.uint16 if mode == "I;16" else np.float32)).save(site.write() / "chest.tiff")
    site.row("a", "chest-xray", "chest.tiff")
    assert_one_fault(check(site), f"chest.tiff: found more than 8 bits per channel (mode {mode})")


def test_picture_and_its_mask(site):
    pixels = np.zeros((5, 4), np.uint8)
    Image.fromarray(pixels).save(site.write() / "mask.png")
    Image.fromarray(pixels + 1).save(site.folder / "chest.png")
    site.row("a", "chest-xray", "chest.png", mask="mask.png")
    assert_one_fault(check(site), "mask.png: found an empty mask")
    Image.fromarray(pixels.T + 1).save(site.folder / "mask.png")
    assert_one_fault(check(site), "mask.png: found a mask of shape 5x4, expected 4x5 as its image")
    Image.fromarray(pixels + 1).save(site.folder / "mask.png")
    assert check(site).exit_code == 0
    (site.folder / "chest.png").write_bytes((site.folder / "chest.png").read_bytes()[:-20])
    assert_one_fault(check(site), "chest.png: found no readable picture")


def test_repaired_image_stays_out_until_the_quarantine_is_written_anew(site):
    bad_image(lambda site, path: path.unlink())(site)
    check(site, "--quarantine")
    site.nifti("broken_brain-mr.nii.gz", np.ones((4, 4, 4), np.int16))
    result = check(site)
    assert result.exit_code == 0
    assert "quarantine.csv: 1 rows are left out of every run" in result.output
    assert "0 rows left out, 2 stay" in check(site, "--quarantine").output
    assert "quarantine.csv" not in check(site).output


def test_quarantine_that_cannot_be_written(site):
    site.add("a")
    (site.folder / QUARANTINE).mkdir()
    result = check(site, "--quarantine")
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
    assert [line.split(":")[0] for line in faults(check(site))] == ["b_brain-mr.nii.gz", "d_brain-mr.nii.gz"]
