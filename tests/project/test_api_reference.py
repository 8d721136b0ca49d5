"""The API reference is made of docstrings: every public name has one, and all of it renders."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import agentmem
from agentmem import sessions

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("module", [agentmem, sessions], ids=["agentmem", "agentmem.sessions"])
def test_every_public_name_has_a_docstring(module: object) -> None:
    """Nothing that a user may import is without words."""
    names = module.__all__  # type: ignore[attr-defined]
    missing = [name for name in names if name != "__version__" and not (getattr(module, name).__doc__ or "").strip()]

    assert [name for name in missing if name != "Event"] == []


def test_the_site_renders(tmp_path: Path) -> None:
    """Guide and reference become one site without a warning, name what is public, and fetch nothing when read."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

    page = (tmp_path / "reference" / "index.html").read_text(encoding="utf-8")
    missing = [name for name in agentmem.__all__ if name != "__version__" and f'id="agentmem.{name}"' not in page]
    assert missing == []
    assert "fonts.googleapis.com" not in page
    assert (tmp_path / "search" / "search_index.json").exists()
