"""API keys, which identify the owner of a request.

Only the digests of the keys are kept. They are compared in constant time.
"""

from __future__ import annotations

import hashlib
import hmac
from pathlib import Path
from typing import Self

from agentmem.errors import RequestRefused, SettingsRefused

LOCAL = "local"
"""The owner of all requests on a server without keys, which only this machine can reach."""
_LEAST = 8
"""Minimum number of characters of a key."""


class ApiKeys:
    """The keys that a server accepts. Owners are identified by the digests of their keys."""

    def __init__(self, keys: tuple[str, ...] = ()) -> None:
        """Set the accepted keys; if there are no keys, every request has the owner :data:`LOCAL`.

        Raises:
            SettingsRefused: a key is too short, contains white space, or is not ASCII.

        """
        for number, key in enumerate(keys, 1):
            if len(key) < _LEAST or len(key.split()) != 1 or not key.isascii():
                raise SettingsRefused(
                    f"api key {number}: {len(key)} characters; a key is one ASCII word of {_LEAST} characters at least"
                )
        self._digests = tuple(_digest(key) for key in keys)

    @classmethod
    def of_file(cls, path: Path) -> Self:
        """Read keys from a file, one per line; empty lines and lines that begin with ``#`` are ignored.

        Raises:
            SettingsRefused: the file cannot be read, or holds no valid key.

        """
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise SettingsRefused(
                f"api key file: cannot read {path}: {error}; give a text file, a key a line"
            ) from None
        keys = tuple(line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#"))
        if not keys:
            raise SettingsRefused(f"api key file: {path} holds no key; write one a line")
        return cls(keys)

    @property
    def required(self) -> bool:
        """True if every request must carry a key."""
        return bool(self._digests)

    def owner(self, authorization: str | None) -> str:
        """Return the owner of a request, found by the key in its ``Authorization`` header.

        Raises:
            RequestRefused: status 401, the key is missing or not accepted.

        """
        if not self._digests:
            return LOCAL
        scheme, _, key = (authorization or "").partition(" ")
        given = _digest(key.strip()) if scheme.lower() == "bearer" else ""
        found = ""
        for digest in self._digests:  # compares all of them, so that the time reveals nothing
            found = digest if hmac.compare_digest(given, digest) else found
        if not found:
            said = "no API key was given" if not authorization else "the API key is not one of this server's"
            raise RequestRefused(
                f"{said}; send the header 'Authorization: Bearer KEY'", status=401, code="invalid_api_key"
            )
        return found


def _digest(key: str) -> str:
    return hashlib.sha256(b"agentmem api key\n" + key.encode()).hexdigest()
