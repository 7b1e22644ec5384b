"""Generates all reference pages of docs/, by file name; a test compares them with the files in docs/reference."""

from simulations.documents import command_page, description_page, file_page, python_page

_RUN = (
    "The description of a run, TOML. Every table and key may be left out but those that are needed. `--set key=value` "
    "changes a key from the command line (`--set train.rounds=3`). An unknown key is an error that names the nearest "
    "known one. Examples are in `configs/experiments/`."
)
_SITE = (
    "The description of a site, TOML, which belongs to the hospital: what it forbids stays forbidden, whatever a run "
    "asks for. `panfm site init` writes one; `configs/sites/example.toml` has every key with its default."
)
_RULES = (
    "Beside a label table; a table for each column that needs one. What it leaves out is told from the values of the "
    "column."
)


def pages() -> dict[str, str]:
    """Generate every page; return file name -> Markdown."""
    return {
        "run-toml.md": description_page.page("run.toml", _RUN, description_page.run_sections()),
        "site-toml.md": description_page.page("site.toml", _SITE, description_page.site_sections()),
        "labels-toml.md": description_page.page("labels.toml", _RULES, description_page.label_rule_sections()),
        "tables.md": file_page.tables_page(),
        "folders.md": file_page.folders_page(),
        "commands.md": command_page.page(),
        "python-names.md": python_page.page(),
    }
