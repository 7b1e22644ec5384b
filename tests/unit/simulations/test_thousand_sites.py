"""The bench of many sites, with twenty of them; and what a process of many sites must not hold."""

import gc
import json
import weakref

import pytest
from flwr.app import Context, RecordDict
from typer.testing import CliRunner

from client import simulated
from panfm.config import dump_toml, site_folders
from panfm.sharing.frames import Frame, Kind
from panfm.sharing.messages import Invitation
from panfm.site import resident_site
from simulations.__main__ import app
from simulations.bench.thousand_sites import describe


@pytest.fixture(autouse=True)
def no_site_is_open():
    resident_site.cache_clear()
    yield
    resident_site.cache_clear()


@pytest.mark.slow
def test_bench_of_twenty_sites(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["bench", "thousand-sites", "--sites", "20", "--rounds", "2", "--json"]
    done = CliRunner().invoke(app, words, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert "round 2/2" in done.output
    table = json.loads((tmp_path / "thousand-sites.json").read_text())
    assert table["config"] == {"sites": 20, "rounds": 2, "subjects": 10}
    counts = {(row["metric"], row["arm"]): row["n"] for row in table["results"]}
    assert counts["seconds", "local"] == counts["seconds", "pure"] == 2
    assert counts["seconds", "handshakes"] == 1
    medians = {row["arm"]: row["mean"] for row in table["results"] if row["metric"] == "cpu_seconds"}
    assert table["ratios"]["over_pure_cpu"] == pytest.approx(medians["local"] / medians["pure"])  # of two, the mean
    assert 0.5 < table["ratios"]["over_pure_cpu"] < 20.0
    assert 1.0 <= table["ratios"]["memory_grown"] < 1.5
    assert table["ratios"]["files_grown"] == pytest.approx(1.0, abs=0.1)


def test_its_sites_are_small_hospitals_of_ten_and_a_tenth_is_asked():
    run = describe(1000, 20)
    assert len(run.cohort["sites"]) == 1000
    assert {(site["subjects"], len(set(site["organs"]))) for site in run.cohort["sites"].values()} == {(10, 2)}
    assert {organ for site in run.cohort["sites"].values() for organ in site["organs"]} == {
        stream.removesuffix("-mr") for stream in run.streams
    }
    asked = (run.model.size, run.train.rounds, run.train.local_steps, run.federation.participation)
    assert asked == ("nano", 20, 20, 0.1)


@pytest.fixture
def many_sites(tmp_path, write_site):
    """A folder of more sites than are kept open; two subjects each, only their descriptions differ."""
    sites = tmp_path / "sites"
    number = resident_site.cache_info().maxsize + 3
    for index in range(number):
        write_site(sites / f"site-{index:03d}", f"site-{index:03d}", ("brain",), 2)
    return sites


def test_sites_asked_long_ago_are_let_go(many_sites, make_run):
    folders = site_folders(many_sites)
    first = weakref.ref(resident_site(folders[0]))
    for folder in folders[1:]:
        resident_site(folder)
    gc.collect()
    assert first() is None
    assert resident_site.cache_info().currsize == resident_site.cache_info().maxsize == len(folders) - 3


def test_the_folder_of_sites_is_looked_at_once(many_sites, monkeypatch, make_run):
    looks = []

    def look(folder):
        looks.append(folder)
        return site_folders(folder)

    monkeypatch.setattr(simulated, "site_folders", look)
    number = len(site_folders(many_sites))
    question = Frame(Kind.HANDSHAKE, Invitation(dump_toml(make_run())).to_records())
    for index in (0, number - 1):
        place = {"partition-id": index, "num-partitions": number}
        answer = simulated.ask(Context(1, index, place, RecordDict(), {"sites": str(many_sites)}), question)
        assert answer.kind is Kind.ANSWER, answer.records.config
    assert looks == [many_sites]
