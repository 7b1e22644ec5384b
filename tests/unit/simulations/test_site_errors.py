from simulations.site_errors import SiteErrors

OLD = """2026-01-01T10:00:00+00:00
Traceback (most recent call last):
  File "x.py", line 1, in f
panfm.errors.DataError: old
"""
NEW = """
2026-01-02T10:00:00+00:00
Traceback (most recent call last):
  File "x.py", line 1, in f
ValueError: inner

The above exception was the direct cause of the following exception:

Traceback (most recent call last):
  File "y.py", line 1, in f
panfm.errors.DataError: manifest.csv:3: found no path, expected a path
manifest.csv:4: found no path, expected a path

"""


def test_new_errors_are_told_in_the_sites_words_once(tmp_path):
    log = tmp_path / "sites" / "a" / "site.log"
    log.parent.mkdir(parents=True)
    log.write_text(OLD)
    errors = SiteErrors(tmp_path)
    assert list(errors.lines()) == []
    with log.open("a") as file:
        file.write(NEW + NEW)
    other = tmp_path / "sites" / "b" / "site.log"
    other.parent.mkdir()
    other.write_text(OLD)
    assert list(errors.lines()) == [
        "site a: DataError: manifest.csv:3: found no path, expected a path",
        "site b: DataError: old",
    ]


def test_no_run_folder_has_no_errors(tmp_path):
    assert list(SiteErrors(tmp_path / "none").lines()) == []
