"""Files from outside: read whole if they are plain and not too large."""

from __future__ import annotations

import stat
from pathlib import Path


def read_plain(path: str | Path, most: int) -> bytes:
    """The bytes of a plain file of at most ``most`` bytes: a device has no end, and a pipe may never answer.

    Raises:
        OSError: it cannot be read, or is another kind of file, or larger.

    """
    about = Path(path).stat()
    if not stat.S_ISREG(about.st_mode) or about.st_size > most:
        raise OSError(f"it is no plain file of at most {most} bytes")
    with Path(path).open("rb") as file:
        raw = file.read(most + 1)
    if len(raw) > most:
        raise OSError(f"it has grown beyond {most} bytes")
    return raw
