"""A hook of the documentation's site: links that lead out of docs/ are of use in the repository alone."""

import posixpath
import re
from typing import Any

_LINK = re.compile(r"\[([^]]+)\]\((\.\./[^)#]+)(#[^)]*)?\)")


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Return a page's text in which files outside of docs/ are named instead of linked; mkdocs calls this."""
    folder = posixpath.dirname(page.file.src_uri)
    return _LINK.sub(lambda link: named(link, folder), markdown)


def named(link: re.Match[str], folder: str) -> str:
    """The link as it is, or its text and the path of a file that lies outside of docs/.

    Args:
        folder: Of the page, relative to docs/.
    """
    path = posixpath.normpath(posixpath.join("docs", folder, link[2]))
    return link[0] if path.startswith("docs/") else f"{link[1]} (`{path}` in the repository)"
