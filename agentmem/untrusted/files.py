"""Read files from untrusted sources, provided that they are regular files and not too large."""

from __future__ import annotations

import stat
from pathlib import Path


def read_plain(path: str | Path, most: int) -> bytes:
    """Return the content of a regular file of at most ``most`` bytes.

    Raises:
        OSError: the file cannot be read, has more than ``most`` bytes, or is not a regular file. Devices and pipes are
            refused because they may be endless.

    """
    about = Path(path).stat()
    if not stat.S_ISREG(about.st_mode) or about.st_size > most:
        raise OSError(f"it is no plain file of at most {most} bytes")
    with Path(path).open("rb") as file:
        raw = file.read(most + 1)
    if len(raw) > most:
        raise OSError(f"it has grown beyond {most} bytes")
    return raw
