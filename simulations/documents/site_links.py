"""Hook of mkdocs: replaces links that lead out of docs/, which work only in the repository, by the files' names."""

import posixpath
import re
from typing import Any

_LINK = re.compile(r"\[([^]]+)\]\((\.\./[^)#]+)(#[^)]*)?\)")


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Replace links to files outside of docs/ in a page's text by their names; mkdocs calls this for every page."""
    folder = posixpath.dirname(page.file.src_uri)
    return _LINK.sub(lambda link: named(link, folder), markdown)


def named(link: re.Match[str], folder: str) -> str:
    """Keep a link within docs/; replace a link that leads out of docs/ by its text and the file's path.

    Args:
        folder: Folder of the page, relative to docs/.
    """
    path = posixpath.normpath(posixpath.join("docs", folder, link[2]))
    return link[0] if path.startswith("docs/") else f"{link[1]} (`{path}` in the repository)"
