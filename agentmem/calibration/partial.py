"""What a calibration has measured so far, on disk, so that a stopped one goes on where it was."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from agentmem.models.files import write_whole

if TYPE_CHECKING:
    from pathlib import Path


REMEDY = "choose another place with --out"


@dataclass
class Partial:
    """Results by unit of work. Every process writes a file of its own and reads those of all.

    ``key`` names everything that a result depends on; files with another key are not looked at.
    """

    out: Path
    key: str
    rank: int = 0
    own: dict[str, Any] = field(default_factory=dict)

    @property
    def path(self) -> Path:
        """This process's file, beside the table that is being made."""
        return self.out.with_name(f"{self.out.name}.partial-{self.rank}")

    def files(self) -> list[Path]:
        """Those of all processes."""
        return sorted(self.out.parent.glob(f"{self.out.name}.partial-*"))

    def load(self) -> dict[str, Any]:
        """All that was measured under this key, by any process."""
        found: dict[str, Any] = {}
        for path in self.files():
            try:
                content = json.loads(path.read_text(encoding="utf-8"))
            except (OSError, ValueError):
                continue  # another process's scratch, or not ours
            if isinstance(content, dict) and content.get("key") == self.key:
                found |= content["done"]
                if path == self.path:
                    self.own = dict(content["done"])
        return found

    def put(self, unit: str, value: object) -> None:
        """Keep one result."""
        self.own[unit] = value
        write_whole(self.path, json.dumps({"key": self.key, "done": self.own}), what="calibration", remedy=REMEDY)

    def remove(self) -> None:
        """Forget everything."""
        for path in self.files():
            path.unlink(missing_ok=True)
