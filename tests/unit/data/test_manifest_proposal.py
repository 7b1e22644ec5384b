"""`panfm site init --from`: what it shows, writes and keeps. Images are empty files: nothing is read but names."""

import os
import shlex
from collections import Counter

import pytest
from typer.testing import CliRunner

from panfm.cli import main
from panfm.config import load_site
from panfm.data.labels import read_cells, read_site_cells
from panfm.data.manifest import read_manifest
from panfm.data.manifest_proposal import draw_split, several_images
from panfm.errors import DataError


def init(site, source, *options):
    words = ["site", "init", site, "--from", source, *options]
    result = CliRunner().invoke(main, [str(word) for word in words])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def touch(root, *paths):
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(b"")
    return root


def rows_of(site):
    return read_manifest(site, load_site(site))


@pytest.fixture
def bids(tmp_path):
    root = touch(
        tmp_path / "bids",
        "dataset_description.json",
        "participants.tsv",
        "derivatives/x/sub-01_T1w.nii.gz",
        ".DS_Store",
        "sub-01/anat/._sub-01_T1w.nii.gz",
        ".git/x.nii",
        "sub-01/func/sub-01_task-rest_bold.nii.gz",
        "sub-01/anat/sub-01_T1w.json",
        *(f"sub-0{n}/anat/sub-0{n}_{kind}.nii.gz" for n in (1, 2) for kind in ("T1w", "FLAIR")),
        *(f"sub-03/ses-{n}/anat/sub-03_ses-{n}_T1w.nii.gz" for n in (1, 2)),
        "sub-02/anat/sub-02_T1w_mask.nii.gz",
    )
    (root / "sub-04").symlink_to(root / "sub-03")
    return root


def test_nothing_is_written_before_it_is_agreed_to(tmp_path, bids):
    result = init(tmp_path / "site", bids)
    assert result.exit_code == 1
    assert result.stderr == "nothing is written; give --yes to write it\n"
    assert not (tmp_path / "site").exists()


@pytest.mark.parametrize(
    ("folder", "name"), [("South Clinic", "south-clinic"), ("Zürich_2", "zurich_2"), ("NORTH", "north"), (".a", "a")]
)
def test_a_site_is_named_after_its_folder(tmp_path, bids, folder, name):
    result = init(tmp_path / folder, bids, "--yes")
    assert result.exit_code == 0, result.output
    assert load_site(tmp_path / folder).name == name
    assert shlex.split(result.output.splitlines()[-1])[-1] == str(tmp_path / folder)


def test_a_folder_that_gives_no_name_is_told(tmp_path, bids):
    result = init(tmp_path / "北京", bids, "--yes")
    assert result.exit_code == 1
    [line] = result.stderr.splitlines()
    assert line == f"--name: needed, as {str(tmp_path / '北京')!r} has no letter of a to z, e.g. --name north"
    assert not (tmp_path / "北京").exists()
    assert init(tmp_path / "北京", bids, "--yes", "--name", "beijing").exit_code == 0


def test_a_bids_folder_becomes_a_site(tmp_path, bids):
    result = init(tmp_path / "clinic", bids, "--yes")
    assert result.exit_code == 0, result.output
    rows = rows_of(tmp_path / "clinic")
    assert load_site(tmp_path / "clinic").name == "clinic"
    assert [(row.subject, row.session, row.stream) for row in rows] == [
        ("sub-01", "", "brain-mr.flair"),
        ("sub-01", "", "brain-mr.t1"),
        ("sub-02", "", "brain-mr.flair"),
        ("sub-02", "", "brain-mr.t1"),
        ("sub-03", "ses-1", "brain-mr.t1"),
        ("sub-03", "ses-2", "brain-mr.t1"),
    ]
    assert rows[0].path == str(bids / "sub-01/anat/sub-01_FLAIR.nii.gz")
    assert [row.mask for row in rows if row.mask] == [str(bids / "sub-02/anat/sub-02_T1w_mask.nii.gz")]
    assert all(row.split == draw_split(row.subject) for row in rows)
    lines = result.output.splitlines()
    names = "dataset_description.json, sub-01/anat/sub-01_T1w.json"
    assert f"left out, no image that a reader accepts: 2: {names}" in lines
    assert (
        "left out, a table; one of labels is named labels.csv and lies beside site.toml: 1: participants.tsv" in lines
    )
    assert "left out, a hidden file: 2: .DS_Store, sub-01/anat/._sub-01_T1w.nii.gz" in lines
    assert "left out, a folder of BIDS without original images: 1: derivatives/" in lines
    assert "left out, a hidden folder: 1: .git/" in lines
    assert "left out, a link to a folder, which is not followed: 1: sub-04/" in lines
    assert any("suffix bold of BIDS" in line and "sub-01_task-rest_bold.nii.gz" in line for line in lines)
    (row,) = [line for line in lines if line.startswith("│ brain-mr.t1 ")]
    assert row.replace("│", " ").split()[:5] == ["brain-mr.t1", "3", "4", "4", "4"]


def test_a_site_is_completed_and_keeps_its_rows(tmp_path):
    site = touch(tmp_path / "clinic", *(f"data/{n}_brain_T1.nii.gz" for n in (1, 2)))
    (site / "site.toml").write_text('name = "own-name"\n')
    text = 'path,subject,stream\ndata/1_brain_T1.nii.gz,One,brain-mr\n\n"x, y.nii",Two,heart-ct\n'
    (site / "manifest.csv").write_text(text)
    assert init(site, site, "--yes").exit_code == 0
    split = draw_split("2")
    expected = (
        text.replace("stream\n", "stream,split\n")
        .replace("brain-mr\n", "brain-mr,\n")
        .replace("heart-ct\n", "heart-ct,\n")
    )
    assert (site / "manifest.csv").read_text() == f"{expected}data/2_brain_T1.nii.gz,2,brain-mr.t1,{split}\n"
    assert (site / "site.toml").read_text() == 'name = "own-name"\n'
    again = init(site, site, "--yes")
    assert again.exit_code == 1
    assert "found no new image" in again.stderr
    touch(site, "more/2_brain_T1.nii.gz")
    other = init(site, site, "--yes")
    assert other.exit_code == 1
    assert (
        "left out, line 5 of the manifest has another image of 2 and brain-mr.t1: 1: more/2_brain_T1.nii.gz"
        in other.output
    )
    assert init(site, site, "--yes", "--name", "other").stderr.startswith("--name: found 'other', expected own-name")


def test_an_empty_manifest_of_site_init_is_filled(tmp_path):
    site = tmp_path / "clinic"
    assert CliRunner().invoke(main, ["site", "init", str(site), "--name", "c"]).exit_code == 0
    images = touch(tmp_path / "images", "liver/a1_CT.nii.gz")
    assert init(site, images, "--yes").exit_code == 0
    assert [(row.subject, row.stream) for row in rows_of(site)] == [("a1", "liver-ct")]


def test_two_images_of_one_subject_and_stream_are_told_apart_by_what_is_written(tmp_path):
    images = touch(tmp_path / "images", "sub-1/anat/sub-1_run-1_T1w.nii", "sub-1/anat/sub-1_run-2_T1w.nii")
    result = init(tmp_path / "clinic", images, "--yes")
    assert result.exit_code == 1
    assert not (tmp_path / "clinic").exists()
    first = result.stderr.splitlines()[0]
    options = "--stream brain-mr.run-1='*_run-1_*' --stream brain-mr.run-2='*_run-2_*'"
    assert first.startswith(
        "subject 'sub-1' has 2 images of brain-mr.t1: sub-1_run-1_T1w.nii, sub-1_run-2_T1w.nii; write"
    )
    assert options in first
    said = [word.replace("'", "") for word in options.split()]
    assert init(tmp_path / "clinic", images, "--yes", *said).exit_code == 0
    assert [row.stream for row in rows_of(tmp_path / "clinic")] == ["brain-mr.run-1", "brain-mr.run-2"]


def option(line, name):
    """The value of an option that a line tells to write."""
    return line.split(f"--{name} '")[1].split("'")[0]


def test_several_images_of_a_patient_are_told_by_name_with_what_to_write(tmp_path):
    """A user writes the options that the note and then the error name, and gets patients with two streams."""
    images = touch(tmp_path / "batch3", *(f"P{n}_brain_T1_{side}.nii.gz" for n in (1, 2, 12) for side in "ab"))
    first = init(tmp_path / "clinic", images)
    (note,) = [line for line in first.output.splitlines() if line.startswith("note: ")]
    assert note.startswith(
        "note: these look like several images of one patient: P12_a, P12_b of P12; P1_a, P1_b of P1; P2_a, P2_b of P2; "
        "each is taken for a patient of its own. If they are one patient's, write --subject '"
    )
    subject = ["--subject", option(note, "subject")]
    second = init(tmp_path / "clinic", images, "--yes", *subject)
    (*_, line) = [line for line in second.stderr.splitlines() if "has 2 images" in line]
    streams = [word.replace("'", "") for word in line.split("; write ")[1].split(" if ")[0].split()]
    assert streams == ["--stream", "brain-mr.a=*_a", "--stream", "brain-mr.b=*_b"]
    assert init(tmp_path / "clinic", images, "--yes", *subject, *streams).exit_code == 0
    both = ("brain-mr.a", "brain-mr.b")
    assert [(row.subject, row.stream) for row in rows_of(tmp_path / "clinic")] == [
        (patient, stream) for patient in ("P1", "P12", "P2") for stream in both
    ]


@pytest.mark.parametrize(
    ("subjects", "patients"),
    [
        (["P1_a", "P1_b"], ["P1"]),
        (["7left", "7right"], []),
        (["7a", "7b"], ["7"]),
        (["12-pre", "12-post", "13-pre"], ["12"]),
        (["OAS1_0001_MR1", "OAS1_0001_MR2", "OAS1_0002_MR1"], ["OAS1_0001"]),
        (["P1_1", "P1_2", "P2_1", "P2_2"], ["P1", "P2"]),
        (["study7_001", "study7_002", "study7_003"], []),  # patients of one study
        (["a_001", "a_002"], []),
        ([f"1_{n}" for n in range(20)], []),
        (["sub-01", "sub-02"], []),
        ([], []),
    ],
)
def test_which_names_look_like_images_of_one_patient(subjects, patients):
    lines = several_images({subject: f"x/{subject}.nii" for subject in subjects})
    assert len(lines) == bool(patients)
    assert all(f" of {patient};" in f"{lines[0]};" for patient in patients)


def test_labels_that_lie_among_the_images_are_taken_and_told(tmp_path):
    images = touch(tmp_path / "images", "a1_brain_T1.nii", "a2_brain_T1.nii", "more/labels.csv")
    (images / "labels.csv").write_text("subject,sick\na1,0\na9,1\n")
    (images / "labels.toml").write_text("")
    result = init(tmp_path / "clinic", images, "--yes")
    lines = result.output.splitlines()
    assert f"labels: sick of {images / 'labels.csv'}, which is copied to {tmp_path / 'clinic' / 'labels.csv'}" in lines
    assert "labels: 1 subject used for images" in lines
    assert "labels: 1 subject not in images: 'a9'" in lines
    assert [line for line in lines if line.endswith(": 1: more/labels.csv")]
    site = load_site(tmp_path / "clinic")
    assert site.labels == "labels.csv"
    assert read_site_cells(tmp_path / "clinic", site).subjects == ("a1", "a9")
    assert (tmp_path / "clinic" / "labels.toml").exists()
    touch(images, "a3_brain_T1.nii")
    assert f"{images / 'labels.csv'}" not in init(tmp_path / "clinic", images, "--yes").output  # it is there already


@pytest.mark.parametrize("why", ["site", "labels", "table"])
def test_labels_that_are_not_taken_are_told_with_what_to_do(tmp_path, why):
    images, site = touch(tmp_path / "images", "a1_brain_T1.nii"), tmp_path / "clinic"
    (images / "labels.csv").write_text("patient,sick\na1,0\n" if why == "table" else "subject,sick\na1,0\n")
    site.mkdir()
    if why == "site":
        (site / "site.toml").write_text('name = "c"\n')
    if why == "labels":
        (site / "labels.csv").write_text("subject,old\na1,0\n")
    result = init(site, images, "--yes", *(["--name", "c"]))
    (line,) = [line for line in result.output.splitlines() if "labels.csv" in line]
    if why == "table":
        assert line.startswith(f"left out, not a table of labels: {images / 'labels.csv'}: ")
        assert not (site / "labels.csv").exists()
    else:
        remedy = (
            f'to use it, copy it to {site / "labels.csv"} and write labels = "labels.csv" into {site / "site.toml"}'
        )
        assert line == f"left out, a table of labels: {images / 'labels.csv'}; {remedy}"
    assert load_site(site).labels == ("labels.csv" if why == "labels" else None)


def test_many_unclear_subjects_are_counted(tmp_path):
    images = touch(tmp_path / "images", *(f"{n:02}/{side}/brain_T1.nii" for n in range(12) for side in "ab"))
    lines = init(tmp_path / "clinic", images, "--subject", r"\d+").stderr.splitlines()
    assert (len(lines), lines[-2]) == (12, "and 2 more such lines")


def test_folders_named_after_a_split_are_believed_and_must_agree(tmp_path):
    images = touch(tmp_path / "images", "train/a1_brain_T1.nii", "test/a2_brain_T1.nii", "val/a3_brain_CT.nii")
    assert init(tmp_path / "clinic", images, "--yes").exit_code == 0
    assert {row.subject: row.split for row in rows_of(tmp_path / "clinic")} == {
        "a1": "train",
        "a2": "test",
        "a3": "val",
    }
    touch(images, "test/a1_brain_CT.nii")
    result = init(tmp_path / "clinic", images, "--yes")
    assert "subject 'a1' is in split test and train, expected one" in result.stderr
    assert (
        init(tmp_path / "hold-out", touch(tmp_path / "h", "b1_brain_T1.nii"), "--yes", "--split", "test").exit_code == 0
    )
    assert [row.split for row in rows_of(tmp_path / "hold-out")] == ["test"]


@pytest.mark.parametrize(("name", "tab"), [("t.csv", ","), ("t.tsv", "\t")])
def test_a_table_becomes_a_site(tmp_path, name, tab):
    touch(tmp_path, "i/a.png", "i/b.png", "i/brain_ct.png", "m.png")
    lines = [["Participant_ID", "file", "stream", "age", "mask"], ["007", "i/a.png", "chest-xray", "9", "m.png"]]
    lines += [["008", "i/b.png", "chest", "9", ""], ["9", "i/brain_ct.png", "", "", ""], ["9", "gone.png", "", "", ""]]
    lines += [["", "i/b.png", "chest-xray", "", ""]]
    (tmp_path / name).write_text("".join(f"{tab.join(line)}\n" for line in lines))
    result = init(tmp_path / "clinic", tmp_path / name, "--yes")
    assert result.exit_code == 0, result.output
    rows = rows_of(tmp_path / "clinic")
    assert [(row.subject, row.stream) for row in rows] == [("007", "chest-xray"), ("9", "brain-ct")]
    assert rows[0].mask == str(tmp_path / "m.png")
    assert f"left out, no such file: 1: {name}:5: gone.png" in result.output
    assert f"left out, no subject: 1: {name}:6: i/b.png" in result.output
    assert "left out, no column of a manifest; labels go into labels.csv: 1: column age" in result.output
    assert "stream 'chest': expected <organ>-<modality>" in result.output


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--stream", "brain-mr"], "--stream: found 'brain-mr', expected STREAM='PATTERN', e.g. brain-mr='*T1w*'"),
        (["--stream", "brain=*"], "--stream: stream 'brain': expected <organ>-<modality>"),
        (["--subject", "("], "--subject: '(' is no regular expression"),
        (["--split", "training"], "--split: found 'training', expected one of train, val, test"),
        (["--name", "A b"], "--name: name: found 'A b', expected text that matches"),
    ],
)
def test_a_mistake_in_an_option_is_one_line(tmp_path, bids, options, complaint):
    result = init(tmp_path / "clinic", bids, "--yes", *options)
    assert result.exit_code == 1
    assert result.stderr.startswith(complaint)
    assert len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "clinic").exists()


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (None, "no such file, expected a folder of images or a table of subject and path"),
        ("a,b\n1,2\n", "found columns a, b, expected one for the subject: subject or participant_id"),
        ("", "found columns nothing, expected one for the subject"),
        ("subject,path,stream\n1,x.nii,brain-mr\n", "found no new image"),
    ],
)
def test_a_source_that_does_not_do_is_one_line(tmp_path, content, complaint):
    if content is not None:
        (tmp_path / "t.csv").write_text(content)
    result = init(tmp_path / "clinic", tmp_path / "t.csv", "--yes")
    assert result.exit_code == 1
    assert complaint in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_subjects_split_is_drawn_from_its_name_alone():
    counts = Counter(draw_split(f"P{number}") for number in range(2000))
    assert counts["train"] + counts["val"] + counts["test"] == 2000
    assert abs(counts["val"] - 200) < 50
    assert abs(counts["test"] - 200) < 50
    assert [draw_split(name) for name in ("sub-01", "sub-02", "sub-03")] == [draw_split(f"sub-0{n}") for n in (1, 2, 3)]


@pytest.mark.parametrize(("answer", "rows"), [("y", 6), ("n", 0)])
def test_somebody_at_a_terminal_is_asked(tmp_path, bids, monkeypatch, answer, rows):
    monkeypatch.setattr("panfm.cli.data_commands._can_ask", lambda: True)
    words = ["site", "init", str(tmp_path / "clinic"), "--from", str(bids)]
    result = CliRunner().invoke(main, words, input=f"{answer}\n")
    assert f"Write 6 rows to {tmp_path / 'clinic'}?" in result.output
    assert result.exit_code == (0 if rows else 1)
    assert len(rows_of(tmp_path / "clinic") if rows else []) == rows


def test_names_that_a_table_cannot_hold_are_left_out(tmp_path):
    images = touch(tmp_path / "images", "1_brain_T1.nii", "2_brain_T1.nii", "3_brain\n_T1.nii", "4_brain_T1.png ")
    (tmp_path / "images" / os.fsdecode(b"5_brain_T1\xff.nii")).touch()
    (images / "gone_brain_T1.nii").symlink_to(images / "nowhere")
    result = init(tmp_path / "clinic", images, "--yes")
    assert [row.subject for row in rows_of(tmp_path / "clinic")] == ["1", "2"]
    assert "left out, a name that a table cannot hold: 3: " in result.output
    assert "left out, a link to nothing: 1: gone_brain_T1.nii" in result.output


def test_a_manifest_of_another_form_is_not_written_to(tmp_path):
    site = touch(tmp_path / "clinic", "data/1_brain_T1.nii.gz")
    (site / "site.toml").write_text('name = "clinic"\n')
    (site / "manifest.csv").write_text("subject;stream;path\n")
    result = init(site, site, "--yes")
    assert result.exit_code == 1
    assert "found 'subject;stream;path', expected a header with commas" in result.stderr
    assert (site / "manifest.csv").read_text() == "subject;stream;path\n"


ROW = "subject,path,stream\nA,{},brain-mr\n"
NO_IMAGE = "left out, no image that a reader accepts: 1: t.csv:2: "
TABLES = {
    "semicolons": ("subject;path\nA;a_brain_mr.nii\n", "found columns subject;path, expected one for the subject"),
    "a shortened number": ("subject,path\n1.2E+05,a_brain_mr.nii\n", "left out, subject '1.2E+05', expected an"),
    "a folder": (ROW.format("folder"), NO_IMAGE),
    "no image": (ROW.format("notes.txt"), NO_IMAGE),
    "another split": ("subject,path,split\nA,a_brain_mr.nii,mine\n", "left out, split 'mine', expected train or val"),
}


@pytest.mark.parametrize("name", TABLES)
def test_a_line_of_a_table_that_becomes_no_row_is_told(tmp_path, name):
    text, told = TABLES[name]
    touch(tmp_path, "a_brain_mr.nii", "folder/x.txt", "notes.txt")
    (tmp_path / "t.csv").write_text(text)
    result = init(tmp_path / "clinic", tmp_path / "t.csv", "--yes")
    assert result.exit_code == 1
    assert told in result.output
    if name == "semicolons":
        assert result.stderr.endswith("(save the table with commas between cells)\n")


@pytest.mark.parametrize("header", ["\ufeffSubject ID,Path,Split", "patient-id,File,split", "Participant,image,SPLIT"])
@pytest.mark.parametrize(("word", "split"), [("Train", "train"), ("TEST", "test"), ("validation", "val")])
def test_headers_and_splits_as_people_write_them(tmp_path, header, word, split):
    touch(tmp_path, "a_brain_mr.nii")
    (tmp_path / "t.csv").write_text(f"{header}\nA,a_brain_mr.nii,{word}\n")
    assert init(tmp_path / "clinic", tmp_path / "t.csv", "--yes").exit_code == 0
    [row] = rows_of(tmp_path / "clinic")
    assert (row.subject, row.split) == ("A", split)


def test_a_subject_with_images_of_several_modalities_is_told(tmp_path):
    """Two departments may number their patients apart."""
    touch(tmp_path / "data", "brain/mr/A01.nii", "liver/ct/A01.nii", "liver/ct/B02.nii", "brain/mr/A03.nii")
    told = init(tmp_path / "clinic", tmp_path / "data", "--yes").output
    assert "1 subject with images of several modalities, e.g. 'A01' with ct and mr: each taken for one person" in told
    touch(tmp_path / "other", "brain/mr/A01_t1.nii", "brain/mr/A01_t2.nii")
    assert "several modalities" not in init(tmp_path / "hospital", tmp_path / "other", "--yes").output


def test_a_number_that_a_spreadsheet_shortened_is_no_subject(tmp_path):
    touch(tmp_path, "a.nii")
    for text, ok in (("1E+05", False), ("1.23e+11", False), ("1e5", True), ("E+05", True), ("s-1E+05", True)):
        (tmp_path / "site.toml").write_text('name = "clinic"\nlabels = "labels.csv"\n')
        (tmp_path / "manifest.csv").write_text(f"subject,stream,path\n{text},brain-mr,a.nii\n")
        (tmp_path / "labels.csv").write_text(f"subject,old\n{text},1\n")
        for read in (rows_of, lambda folder: read_cells(folder / "labels.csv")):
            if ok:
                read(tmp_path)
            else:
                with pytest.raises(DataError, match="that no spreadsheet has shortened: format the column as text"):
                    read(tmp_path)
