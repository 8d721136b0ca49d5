"""What a calibration has measured so far, on disk, so that a stopped one goes on where it was."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from agentmem.models.files import write_whole
from agentmem.untrusted.files import read_plain
from agentmem.untrusted.json_text import parsed

if TYPE_CHECKING:
    from pathlib import Path


_MAX_BYTES = 64 << 20
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
                content = parsed(read_plain(path, _MAX_BYTES), _MAX_BYTES)
            except (OSError, ValueError):
                continue  # another process's scratch, or not ours
            done = content.get("done")
            if content.get("key") == self.key and isinstance(done, dict):
                found |= done
                if path == self.path:
                    self.own = done
        return found

    def put(self, unit: str, value: object) -> None:
        """Keep one result."""
        self.own[unit] = value
        write_whole(self.path, json.dumps({"key": self.key, "done": self.own}), what="calibration", remedy=REMEDY)

    def remove(self) -> None:
        """Forget everything."""
        for path in self.files():
            path.unlink(missing_ok=True)
