"""The API reference is made of docstrings: every public name has one, and all of it renders."""

from __future__ import annotations

import pydoc
import subprocess
import sys
from pathlib import Path
from typing import Any

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
    assert not any(each in page for each in ("PydanticUndefined", ":class:", "__reduce_ex__"))
    assert all(f'id="agentmem.SessionSettings.{name}"' in page for name in agentmem.SessionSettings.model_fields)
    assert "fonts.googleapis.com" not in page
    assert (tmp_path / "search" / "search_index.json").exists()


def test_help_shows_the_interface_of_a_session_and_nothing_else() -> None:
    """Its methods and properties, ``reply`` among them, and none of the state that the package itself uses."""
    shown = pydoc.render_doc(agentmem.Session, renderer=pydoc.plaintext)

    for name in ("reply", "stats", "transcript", "append(", "generate(", "fork("):
        assert f"\n |  {name}" in shown
    for name in ("compacted(", "want(", "skip_rebases(", "engine", "holding", "draft"):
        assert f"\n |  {name}" not in shown


@pytest.mark.parametrize("settings", [agentmem.Settings, agentmem.SessionSettings])
def test_help_shows_every_setting_with_its_default(settings: Any) -> None:
    """Each field has its default and what it means; no placeholder stands for one that is required."""
    shown = " ".join(pydoc.render_doc(settings, renderer=pydoc.plaintext).replace(" | ", " ").split())

    assert "PydanticUndefined" not in shown
    for name, field in settings.model_fields.items():
        default = "required" if field.is_required() else repr(field.default)
        assert f"{name} ({default}): {' '.join((field.description or '-').split())[:40]}" in shown
