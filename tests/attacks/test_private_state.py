"""The server names a private run like one without privacy, to start it from what that one has learned."""

from dataclasses import replace

import nibabel
import numpy as np
import pytest
import safetensors.numpy

from panfm.config import dump_toml, experiment_hash, parse_run
from panfm.errors import DataError
from panfm.files import read_checked, write_checked
from panfm.sharing.frames import Frame, Kind
from panfm.sharing.messages import RoundTask
from panfm.site import Site, answer
from panfm.site.state import end_run
from tests.cases import quick
from tests.unit.site.test_private_site import PRIVACY, spent, task

BROKEN = PRIVACY + "acknowledge-broken-guarantee = true\n"


@pytest.fixture
def folder(tmp_path, write_site):
    return write_site(tmp_path / "alpha", "alpha", ("brain", "heart"))


def states(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob(".panfm/state/runs/*/*.state")}


def hash_of(asked: RoundTask) -> str:
    return experiment_hash(parse_run(asked.run_toml))


def test_server_goes_on_privately_from_five_rounds_without_privacy(folder):
    """Teacher, optimiser and experts of round 5 would have come out of round 6 under a claim of privacy."""
    site = Site(folder)
    for number in range(1, 6):
        site.train_round(task(number, privacy=""))
    before = states(folder)
    asked = task(6)
    for each in (site, Site(folder)):
        with pytest.raises(DataError) as caught:
            each.train_round(asked)
        [line] = str(caught.value).splitlines()
        assert f"comes from experiment {hash_of(task(privacy=''))[:24]}, expected {hash_of(asked)[:24]}" in line
        assert "move " in line
    assert states(folder) == before
    assert spent(site) == []


@pytest.mark.parametrize("number", quick([1, 4], 1))
@pytest.mark.parametrize(
    ("first", "then"),
    [("", PRIVACY), (PRIVACY, ""), (BROKEN, PRIVACY), (PRIVACY.replace("1.5", "3.0"), PRIVACY)],
    ids=["plain-private", "private-plain", "broken-private", "private-private"],
)
def test_server_uses_a_run_id_twice(folder, first, then, number):
    """Whether it asks for the round after, a later one, or starts again, which would begin afresh without a word."""
    site = Site(folder)
    site.train_round(task(2, privacy=first))
    before, paid = states(folder), len(spent(site))
    with pytest.raises(DataError, match="comes from experiment"):
        site.train_round(task(number, privacy=then))
    assert states(folder) == before
    assert len(spent(site)) == paid


def test_the_server_is_told_of_no_hash_and_no_path(folder):
    site = Site(folder)
    site.train_round(task(1, privacy=""))
    refused = answer(site, Frame(Kind.ROUND, task(2).to_records()))
    assert refused == Frame.error(
        "site alpha: DataError: this site's data or private state is faulty; its log tells more"
    )


def other_image(folder):
    path = folder / "alpha-0-brain.nii.gz"
    random = np.random.default_rng(99)
    volume = random.uniform(0, 1000, size=(8, 8, 8)).astype(np.int16)
    nibabel.save(nibabel.Nifti1Image(volume, np.diag([8.0, 8.0, 8.0, 1.0])), path)


def one_patient_less(folder):
    manifest = folder / "manifest.csv"
    rows = manifest.read_text().splitlines(keepends=True)
    manifest.write_text("".join(row for row in rows if "alpha-0" not in row))


def one_image_less(folder):
    manifest = folder / "manifest.csv"
    rows = manifest.read_text().splitlines(keepends=True)
    manifest.write_text("".join(row for row in rows if "alpha-0,brain" not in row))


@pytest.mark.parametrize("change", [other_image, one_patient_less, one_image_less])
@pytest.mark.parametrize("privacy", [PRIVACY, ""])
def test_state_of_other_patients_is_not_gone_on_from(folder, change, privacy):
    """A withdrawn patient would live on in it; and the ledger tells that patients or images are others."""
    Site(folder).train_round(task(1, privacy=privacy))
    change(folder)
    with pytest.raises(DataError, match="comes from patients"):
        Site(folder).train_round(task(2, privacy=privacy))
    end_run(folder / ".panfm" / "state", "run-1")
    Site(folder).train_round(task(2, run_id="other", privacy=privacy))
    datasets = [entry["dataset"] for entry in spent(Site(folder))[1:]]
    assert len(set(datasets)) == len(datasets)


def test_a_manifest_in_another_order_holds_the_same_patients(folder):
    """The control."""
    Site(folder).train_round(task(1))
    head, *rows = (folder / "manifest.csv").read_text().splitlines()
    (folder / "manifest.csv").write_text("\n".join([head, *reversed(rows)]) + "\n")
    assert Site(folder).train_round(task(2)).state_round == 1


def test_a_state_that_does_not_say_where_it_comes_from_is_refused(folder):
    """As versions before this one wrote it."""
    Site(folder).train_round(task(1))
    [path] = folder.glob(".panfm/state/runs/run-1/*.state")
    write_checked(path, safetensors.numpy.save(safetensors.numpy.load(read_checked(path))))
    with pytest.raises(DataError) as caught:
        Site(folder).train_round(task(2))
    [line] = str(caught.value).splitlines()
    assert line == (
        f"{path}: does not say which experiment it comes from; move {path.parent} away to start run run-1 afresh"
    )


def test_the_same_run_goes_on(folder):
    """The control: warm, cold, and asked again."""
    site = Site(folder)
    assert [site.train_round(task(number)).state_round for number in (1, 2)] == [0, 1]
    assert Site(folder).train_round(replace(task(2), run_toml=dump_toml(parse_run(task().run_toml)))).state_round == 1
