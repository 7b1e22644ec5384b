from types import SimpleNamespace

from simulations.documents.site_links import on_page_markdown


def test_links_out_of_the_docs_become_names():
    page = SimpleNamespace(file=SimpleNamespace(src_uri="tutorials/a.md"))
    text = "[b](../b.md#c), [d](../../examples/d.ipynb), [e](e.md), [f](https://g.org)"
    expected = "[b](../b.md#c), d (`examples/d.ipynb` in the repository), [e](e.md), [f](https://g.org)"
    assert on_page_markdown(text, page=page) == expected
