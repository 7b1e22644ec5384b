"""The report in headless Chromium: no error, all sections there, nothing clipped or over another, at three widths.

Screenshots are kept in the folder that the environment variable PANFM_SCREENSHOTS names, or in build/screenshots of the
repository, which git ignores.
"""

import os
import re
import shutil
from pathlib import Path

import pytest

from panfm.files import locked
from panfm.report.report_page import write_comparison, write_report
from panfm.report.run_files import read_run
from panfm.report.status_page import write_status
from tests.unit.report.made_runs import LONG, make_run

WIDTHS = (400, 800, 1400)
LOCAL = ("file:", "data:")
CHROMIUM = shutil.which("chromium")

ROOT = Path(__file__).parents[3]
FAULTS = Path(__file__).with_name("page_faults.js").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
def test_the_page_in_a_browser(tmp_path):
    from playwright.sync_api import sync_playwright

    plain = make_run(tmp_path / "plain", ["alpha", "beta", "gamma"], model={"backbone": "director-experts"})
    hostile = make_run(
        tmp_path / "hostile", LONG, label="a-label-of-very-many-words-" * 3, hostile="<script>x</script>"
    )
    pages = {
        "report": write_report(read_run(plain)),
        "report-long": write_report(read_run(hostile)),
        "comparison": write_comparison([read_run(plain), read_run(hostile)], tmp_path / "comparison.html"),
    }
    screenshots = Path(os.environ.get("PANFM_SCREENSHOTS") or ROOT / "build" / "screenshots")
    faults: list[str] = []
    screenshots.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        for name, path in pages.items():
            for width in WIDTHS:
                for scheme in ("light", "dark"):
                    picture = screenshots / f"{name}-{width}-{scheme}.png"
                    faults += [f"{picture.stem}: {fault}" for fault in open_page(browser, path, width, scheme, picture)]
        assert not faults, "\n".join(faults)
        assert_prints(browser, pages["report"], screenshots / "report-print.png")
        assert_reached_by_keyboard(browser, pages["report"])
        assert_faults_are_seen(browser, pages["report"])
        browser.close()


def open_page(browser, path, width, scheme, screenshot):
    """Faults of a page as it opens and with all details opened, and errors of the console; takes a picture."""
    page, faults = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme), []
    page.on("console", lambda message: faults.append(message.text))
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on(
        "request", lambda request: None if request.url.startswith(("file:", "data:")) else faults.append(request.url)
    )
    page.goto(path.as_uri())
    faults += page.evaluate(FAULTS)
    page.screenshot(path=screenshot, full_page=True)
    if scheme == "light":
        page.evaluate("() => document.querySelectorAll('details').forEach((details) => { details.open = true; })")
        faults += page.evaluate(FAULTS)
    page.close()
    return faults


def assert_prints(browser, path, screenshot):
    """Assert that the page prints on A4 without faults, also from a dark screen, and keep a screenshot."""
    page = browser.new_page(viewport={"width": 794, "height": 1123}, color_scheme="dark")
    page.emulate_media(media="print")
    page.goto(path.as_uri())
    assert page.evaluate(FAULTS) == []
    assert page.evaluate("() => getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    page.screenshot(path=screenshot, full_page=True)
    page.close()


def assert_reached_by_keyboard(browser, path):
    """Links, tables and details get the focus by the tabulator key, and Enter opens details."""
    page = browser.new_page()
    page.goto(path.as_uri())
    reached = set()
    for _ in range(60):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.tagName + '.' + document.activeElement.className"))
        if "SUMMARY." in reached:
            page.keyboard.press("Enter")
            break
    assert {"A.", "DIV.table", "SUMMARY."} <= reached
    assert page.evaluate("document.activeElement.parentElement.open")
    page.close()


def assert_faults_are_seen(browser, path):
    """A sentence that is moved over its neighbour, and a chart's word that leaves its frame."""
    page = browser.new_page()
    page.goto(path.as_uri())
    page.evaluate("document.querySelector('#verdict p + p').style.marginTop = '-3rem'")
    page.evaluate("document.querySelector('figure svg text').setAttribute('x', '-20')")
    faults = " ".join(page.evaluate(FAULTS))
    assert "is over" in faults
    assert "is clipped" in faults
    page.close()


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
def test_an_old_status_page_says_by_itself_that_it_is_stale(tmp_path):
    from playwright.sync_api import sync_playwright

    folder = make_run(tmp_path / "run", ["alpha"])
    with locked(folder / ".lock", wait_s=0.0):
        path = write_status(folder)
    old = folder / "old.html"
    old.write_text(re.sub(r'data-due="\d+"', 'data-due="1000000000"', path.read_text()))
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        for page_path, is_stale in ((path, False), (old, True)):
            page = browser.new_page()
            page.goto(page_path.as_uri())
            assert page.inner_text("#age").startswith("Last heard of at" if is_stale else "as of")
            assert page.evaluate("document.getElementById('age').className") == ("stale" if is_stale else "quiet")
        browser.close()
