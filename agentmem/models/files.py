"""Write files so that an interrupted write never leaves an incomplete file."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from agentmem.errors import AgentmemError

if TYPE_CHECKING:
    from pathlib import Path


def write_whole(path: Path, text: str, *, what: str, remedy: str) -> None:
    """Write ``text`` as UTF-8 to a scratch file and rename it to ``path``; create the folder if it is missing.

    Raises:
        AgentmemError: the file cannot be written; ``what`` begins the message and ``remedy`` ends it.

    """
    scratch = path.with_name(f"{path.name}.{os.getpid()}.scratch")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch.write_text(text, encoding="utf-8")
        scratch.replace(path)
    except OSError as error:
        raise AgentmemError(f"{what}: cannot write {path}: {error.strerror or error}; {remedy}") from error
