"""`panfm split`: patients whole, seeded, nobody lost, sites that a run can open."""

import itertools
import os
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from panfm.cli import main
from panfm.config import load_site, site_folders
from panfm.data.manifest import Row, read_manifest
from panfm.data.partition import HOLDOUT, PooledSite, draw_places, site_name
from panfm.data.tables import read_table
from panfm.errors import DataError

STREAMS = ("brain-mr", "heart-ct")


def pooled(num_subjects=40, *, tests=0, scanners="AB"):
    """Subjects with one or two streams and sessions; every third has both streams."""
    rows = []
    for number in range(num_subjects):
        split = "test" if number < tests else "train"
        for stream in STREAMS if number % 3 == 0 else STREAMS[number % 2 : number % 2 + 1]:
            rows += [
                Row(0, f"s{number:03d}", stream, f"/x/{number}-{stream}-{visit}.nii", split, "", visit)
                for visit in "12"
            ]
    return PooledSite(
        tuple(rows), {f"s{number:03d}": {"scanner": scanners[number % len(scanners)]} for number in range(num_subjects)}
    )


@settings(max_examples=40)
@given(
    st.sampled_from(["iid", "size", "label", "stream"]),
    st.integers(1, 4),
    st.sampled_from([0.0, 0.1, 0.5]),
    st.sampled_from([0.3, 1.0, 100.0]),
    st.integers(0, 5),
)
def test_everybody_goes_to_one_place_and_the_same_seed_gives_the_same_places(by, sites, holdout, alpha, seed):
    given_site = pooled()
    options = {"sites": sites, "holdout": holdout, "alpha": alpha, "seed": seed, "label": "scanner"}
    try:
        places = draw_places(given_site, by, **options)
    except DataError:
        assume(False)
    subjects = sorted({row.subject for row in given_site.rows})
    assert sorted(itertools.chain(*places.values())) == subjects
    assert len(places.get(HOLDOUT, [])) == round(holdout * len(subjects))
    assert list(places) == [*([HOLDOUT] if holdout else []), *(site_name(n + 1, sites) for n in range(sites))]
    assert draw_places(given_site, by, **options) == places


def test_iid_deals_out_equal_parts_and_another_seed_others():
    drawn = [draw_places(pooled(), "iid", sites=4, holdout=0.0, alpha=1.0, seed=seed) for seed in (0, 1)]
    assert [len(part) for part in drawn[0].values()] == [10] * 4
    assert drawn[0] != drawn[1]


def test_a_small_alpha_gives_each_scanner_to_few_sites_and_a_large_one_to_all():
    def largest_share(alpha):
        shares = []
        for seed in range(20):
            try:
                places = draw_places(
                    pooled(200), "label", sites=2, holdout=0.0, alpha=alpha, seed=seed, label="scanner"
                )
            except DataError:
                continue
            for parity in (0, 1):
                counts = [sum(int(one[1:]) % 2 == parity for one in part) for part in places.values()]
                shares.append(max(counts) / sum(counts))
        return sum(shares) / len(shares)

    assert largest_share(0.05) > 0.9
    assert largest_share(1000.0) < 0.55


def test_streams_are_dealt_out_by_the_set_that_a_subject_has():
    kinds = pooled(6).kinds("stream", None)
    assert Counter(kinds.values()) == {"brain-mr heart-ct": 2, "brain-mr": 2, "heart-ct": 2}


def test_the_hold_out_takes_the_split_test_first():
    places = draw_places(pooled(tests=5), "iid", sites=2, holdout=0.2, alpha=1.0, seed=3)
    assert {f"s00{number}" for number in range(5)} < set(places[HOLDOUT])
    assert len(places[HOLDOUT]) == 8


@pytest.mark.parametrize(
    ("by", "sites", "remedy"),
    [("iid", 50, "fewer --sites"), ("size", 20, "a larger --alpha, fewer --sites or another --seed")],
)
def test_a_site_without_training_subjects_is_refused(by, sites, remedy):
    with pytest.raises(DataError, match=f"no training subject, expected one at every site; give {remedy}"):
        draw_places(pooled(), by, sites=sites, holdout=0.0, alpha=0.05, seed=0)


def test_a_hold_out_of_nobody_is_refused():
    with pytest.raises(DataError, match="holdout: no subject of 4, expected at least one; give a larger --holdout"):
        draw_places(pooled(4), "iid", sites=1, holdout=0.1, alpha=1.0, seed=0)


@pytest.mark.parametrize(
    ("label", "message"),
    [("age", "--label: found age, expected a column of labels.csv: scanner"), ("scanner", "40 different values of 40")],
)
def test_a_label_that_does_not_do(label, message):
    site = pooled(scanners=[str(number) for number in range(40)])
    with pytest.raises(DataError, match=message):
        draw_places(site, "label", sites=2, holdout=0.0, alpha=1.0, seed=0, label=label)


@pytest.fixture
def clinic(site):
    for number in range(12):
        site.row(
            f"s{number:02d}", split="val" if number == 3 else "train", mask=f"m{number}.nii" if number == 0 else ""
        )
    lines = "".join(f"s{number:02d},{'AB'[number % 2]},{number}\n" for number in range(11))
    (site.write() / "labels.csv").write_text(f"subject,scanner,age\n{lines}")
    return site.folder


def split(*words):
    result = CliRunner().invoke(main, ["split", *map(str, words)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def test_labels_are_joined_whatever_the_spelling(clinic, tmp_path):
    table = clinic / "labels.csv"
    table.write_text(table.read_text().replace("s01,", "S1,").replace("s02,", "s002,"))
    assert split(clinic, "--out", tmp_path / "out", "--sites", 2, "--holdout", 0).exit_code == 0
    written = "".join(path.read_text() for path in (tmp_path / "out" / "sites").glob("*/labels.csv"))
    assert {"s01", "s02"} <= {line.partition(",")[0] for line in written.splitlines()}


@pytest.mark.parametrize("option", ["--alpha", "--holdout"])
def test_nan_is_outside_of_every_range(clinic, tmp_path, option):
    result = split(clinic, "--out", tmp_path / "out", "--sites", 2, "--by", "size", option, "nan")
    assert result.exit_code == 2
    assert "nan, expected a number" in result.output


def test_classes_are_printed_as_they_are_written(clinic, tmp_path):
    """`[/a]` would end a style in the markup of rich."""
    table = clinic / "labels.csv"
    table.write_text(table.read_text().replace(",A,", ",[/a],"))
    words = ["--sites", 2, "--by", "label", "--label", "scanner", "--alpha", 10]
    result = split(clinic, "--out", tmp_path / "out", *words)
    assert result.exit_code == 0
    assert "[/a]" in result.output


def test_sites_are_written_with_paths_that_lead_to_the_images(clinic, tmp_path):
    out = tmp_path / "fed"
    result = split(
        clinic, "--out", out, "--sites", 2, "--by", "label", "--label", "scanner", "--alpha", 10, "--holdout", 0.25
    )
    assert result.exit_code == 0, result.output
    folders = [*site_folders(out / "sites"), out / "holdout"]
    assert [folder.name for folder in folders] == ["site-1", "site-2", "holdout"]
    subjects = []
    for folder in folders:
        site = load_site(folder)
        rows = read_manifest(folder, site)
        for row in rows:
            assert os.path.normpath(folder / row.path) == str(clinic / f"{row.subject}_brain-mr.nii.gz")
            assert not Path(row.path).is_absolute()
        assert {row.mask and os.path.normpath(folder / row.mask) for row in rows} <= {"", str(clinic / "m0.nii")}
        assert site.name == folder.name
        subjects += [row.subject for row in rows]
        columns, labels = read_table(folder / site.labels, ("subject",))
        assert columns == ["subject", "scanner", "age"]
        assert {cells["subject"] for _, cells in labels} == {row.subject for row in rows} - {"s11"}
        assert all(cells["age"] == str(int(cells["subject"][1:])) for _, cells in labels)
        assert {row.split for row in rows} <= ({"test"} if folder.name == "holdout" else {"train", "val"})
    assert sorted(subjects) == [f"s{number:02d}" for number in range(12)]
    assert "(unknown)" in result.output
    before = {path: path.read_bytes() for path in out.rglob("*.*") if path.is_file()}
    again = split(clinic, "--out", out)
    assert again.stderr == f"{out}: exists already, expected a new folder\n"
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--by", "scanner"], "--by: found 'scanner', expected one of stream, label, size, iid"),
        (["--by", "label"], "--label: names the column of --by label, expected both or neither"),
        (["--label", "age"], "--label: names the column of --by label, expected both or neither"),
    ],
)
def test_a_mistake_in_an_option_of_split_is_one_line(clinic, tmp_path, options, message):
    result = split(clinic, "--out", tmp_path / "fed", *options)
    assert (result.exit_code, result.stderr) == (1, f"{message}\n")
