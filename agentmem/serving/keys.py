"""API keys: who a request is from. Keys are compared in constant time, and only their digests are kept."""

from __future__ import annotations

import hashlib
import hmac
from pathlib import Path
from typing import Self

from agentmem.errors import RequestRefused, SettingsRefused

LOCAL = "local"
"""Whose everything is on a server without keys, which only this machine reaches."""
_LEAST = 8
"""Characters of a key."""


class ApiKeys:
    """The keys that a server accepts. ``owner`` names a key without showing it."""

    def __init__(self, keys: tuple[str, ...] = ()) -> None:
        """No keys: everyone who reaches the server is :data:`LOCAL`.

        Raises:
            SettingsRefused: a key is too short to be one, or holds blanks.

        """
        for number, key in enumerate(keys, 1):
            if len(key) < _LEAST or len(key.split()) != 1 or not key.isascii():
                raise SettingsRefused(
                    f"api key {number}: {len(key)} characters; a key is one ASCII word of {_LEAST} characters at least"
                )
        self._digests = tuple(_digest(key) for key in keys)

    @classmethod
    def of_file(cls, path: Path) -> Self:
        """The keys of a file, one a line; empty lines and lines that begin with # are left out.

        Raises:
            SettingsRefused: it cannot be read, or holds no key.

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
        """Whether requests must bring a key."""
        return bool(self._digests)

    def owner(self, authorization: str | None) -> str:
        """Whose request this is, by its ``Authorization`` header.

        Raises:
            RequestRefused: 401, no key or a wrong one.

        """
        if not self._digests:
            return LOCAL
        scheme, _, key = (authorization or "").partition(" ")
        given = _digest(key.strip()) if scheme.lower() == "bearer" else ""
        found = ""
        for digest in self._digests:  # all of them, whichever fits: the time says nothing
            found = digest if hmac.compare_digest(given, digest) else found
        if not found:
            said = "no API key was given" if not authorization else "the API key is not one of this server's"
            raise RequestRefused(
                f"{said}; send the header 'Authorization: Bearer KEY'", status=401, code="invalid_api_key"
            )
        return found


def _digest(key: str) -> str:
    return hashlib.sha256(b"agentmem api key\n" + key.encode()).hexdigest()
