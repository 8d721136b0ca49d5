"""Hook of mkdocs: cross-references of docstrings are shown as plain names."""  # noqa: INP001  # loaded by its path

from __future__ import annotations

import re

_ROLE = re.compile(r":(?:class|meth|func|attr|data|mod|exc):\s*(?=<code>)")
"""The role before a name, such as ``:class:``, which Sphinx would turn into a link."""


def on_page_content(html: str, **_: object) -> str:
    """Return a page's HTML without the roles of docstrings."""
    return _ROLE.sub("", html)
