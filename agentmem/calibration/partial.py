"""Keep the results of a calibration's units of work on disk, so that a stopped calibration can be resumed."""

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
    """Store the results of a calibration that is not finished, for one process of this calibration.

    The work of a calibration is divided into named units, which several processes may share. Every process writes the
    results of its units to its own file, and reads the files of all processes.

    ``out`` is the path of the table that the calibration will write. ``key`` is a digest of everything that a result
    depends on, and is stored in each file. A file that stores a different key is ignored, because its results are of
    another calibration. ``rank`` is the number of this process, and ``own`` maps names of units to the results of this
    process.
    """

    out: Path
    key: str
    rank: int = 0
    own: dict[str, Any] = field(default_factory=dict)

    @property
    def path(self) -> Path:
        """Return the path of this process's file, beside the table that the calibration will write."""
        return self.out.with_name(f"{self.out.name}.partial-{self.rank}")

    def files(self) -> list[Path]:
        """Return the paths of all files with stored results beside the table ``out``, one file per process."""
        return sorted(self.out.parent.glob(f"{self.out.name}.partial-*"))

    def load(self) -> dict[str, Any]:
        """Return the results of all processes, as a dict from the name of a unit of work to its result.

        Each file states the calibration that it belongs to (its ``key``). Files of other calibrations are ignored.
        """
        found: dict[str, Any] = {}
        for path in self.files():
            try:
                content = parsed(read_plain(path, _MAX_BYTES), _MAX_BYTES)
            except (OSError, ValueError):
                continue  # a temporary file of another process, or no file of a calibration
            done = content.get("done")
            if content.get("key") == self.key and isinstance(done, dict):
                found |= done
                if path == self.path:
                    self.own = done
        return found

    def put(self, unit: str, value: object) -> None:
        """Store ``value`` as the result of the unit of work ``unit``, and write this process's file."""
        self.own[unit] = value
        write_whole(self.path, json.dumps({"key": self.key, "done": self.own}), what="calibration", remedy=REMEDY)

    def remove(self) -> None:
        """Delete all files with stored results beside the table ``out``, whichever process wrote them."""
        for path in self.files():
            path.unlink(missing_ok=True)
