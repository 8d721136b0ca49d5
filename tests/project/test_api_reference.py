"""The API reference is made of docstrings: every public name has one, and all of it renders."""

from __future__ import annotations

from pathlib import Path

import pdoc
import pytest

import agentmem
from agentmem import sessions

PUBLIC = ("agentmem", "agentmem.contracts", "agentmem.queries", "agentmem.sessions", "agentmem.testing")
"""What `make docs` renders first; the others follow from it."""


@pytest.mark.parametrize("module", [agentmem, sessions], ids=["agentmem", "agentmem.sessions"])
def test_every_public_name_has_a_docstring(module: object) -> None:
    """Nothing that a user may import is without words."""
    names = module.__all__  # type: ignore[attr-defined]
    missing = [name for name in names if name != "__version__" and not (getattr(module, name).__doc__ or "").strip()]

    assert [name for name in missing if name != "Event"] == []


def test_the_reference_renders(tmp_path: Path) -> None:
    """Every public module becomes a page that names what is in it, without a warning."""
    pdoc.render.configure(docformat="google")
    pdoc.pdoc(*PUBLIC, output_directory=tmp_path)

    page = (tmp_path / "agentmem.html").read_text(encoding="utf-8")
    for name in agentmem.__all__:
        assert f'id="{name}"' in page, name
    runtime = (tmp_path / "agentmem" / "sessions.html").read_text(encoding="utf-8")
    assert "SettingsRefused" in runtime
