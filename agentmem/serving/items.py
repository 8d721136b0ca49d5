"""Compaction items: each is a memory saved on disk, and an encrypted token that contains the id of this memory.

The token is authenticated, and reveals nothing without the server's key. It can be used only with the API key, the
model weights, the tokenizer and the chat template for which it was made. It has the Fernet format of the package
``cryptography``.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cryptography.fernet import Fernet, InvalidToken, MultiFernet

from agentmem.errors import RequestRefused, SettingsRefused
from agentmem.serving.kept import Kept, Record

if TYPE_CHECKING:
    from agentmem import Session
    from agentmem.serving.conversations import Conversation

_LONGEST = 4096
"""Maximum length of an accepted token in characters."""


@dataclass(frozen=True, slots=True)
class Item:
    """A compaction item: the id of a saved memory, its folder, and its record."""

    id: str
    folder: Path
    record: Record


class Items:
    """The compaction items of a server: makes an item from a session, and finds an item by its token.

    A compaction item is a memory saved on disk. Its token is an encrypted string, which a client sends to continue from
    this memory.
    """

    def __init__(self, kept: Kept, keys: list[bytes], identity: Mapping[str, str], seconds: float) -> None:
        """Set where compaction items are saved, how their tokens are encrypted, and how long items are valid.

        A compaction item is a memory saved on disk. Its token is an encrypted string with the item's id, which a client
        sends to continue from this memory.

        Args:
            kept: the folder for the saved memories.
            keys: Fernet keys. The first key encrypts new tokens; tokens made with any of the keys can be read.
            identity: identifies the runtime's model weights, tokenizer and chat template. A token is refused if it was
                made for another identity.
            seconds: the time for which an item is valid.

        """
        self.kept, self._cipher, self._seconds = kept, MultiFernet([Fernet(key) for key in keys]), seconds
        self._identity = hashlib.sha256(json.dumps(dict(identity), sort_keys=True).encode()).hexdigest()

    def make(self, conversation: Conversation, session: Session) -> tuple[str, str]:
        """Save the present memory of a session on disk as a compaction item; return the item's id and token.

        The token is an encrypted string with the id. A client sends the token to continue from the saved memory. If a
        forward pass is running, this method waits for its end first.

        Raises:
            AgentmemError: the memory cannot be written.
            RuntimeBusy: the runtime is busy; try again later.

        """
        name = secrets.token_hex(16)
        self.kept.keep(name, session, Record.of(conversation))
        said = {"item": name, "owner": conversation.owner, "model": self._identity, "created": time.time()}
        return name, self._cipher.encrypt(json.dumps(said).encode()).decode()

    def find(self, token: str, owner: str) -> Item:
        """Find a compaction item (a memory saved on disk) by its token, and return the item.

        ``token`` is the encrypted string that :meth:`make` returned for the item. ``owner`` identifies the client's API
        key.

        Raises:
            RequestRefused: status 400 if the token is forged, damaged, expired or of another model; status 403 if the
                token was made for another API key; status 404 if the memory was deleted.

        """
        said = self._read(token)
        if not hmac.compare_digest(str(said["owner"]), owner):
            raise _refused("it was made for another API key; use the key it was made with", 403, "compaction_foreign")
        if said["model"] != self._identity:
            raise _refused(
                "it was made with another model, tokenizer or chat template; read the conversation anew",
                400,
                "compaction_other_model",
            )
        age = time.time() - float(said["created"])
        if age > self._seconds:
            raise _refused(
                f"it is {age:.0f} s old, and items are good for {self._seconds:.0f} s; read the conversation anew",
                400,
                "compaction_expired",
            )
        name = str(said["item"])
        record = self.kept.record(name)
        if record is None:
            raise forgotten()
        return Item(name, self.kept.memory(name), record)

    def _read(self, token: str) -> dict[str, str | float]:
        if len(token) <= _LONGEST and token.isascii():
            try:
                said: dict[str, str | float] = json.loads(self._cipher.decrypt(token))
            except InvalidToken:
                pass
            else:
                return said
        raise _refused(
            "it is none of this server's, or was changed on the way; send it as it came", 400, "compaction_invalid"
        )


def forgotten() -> RequestRefused:
    """Return the refusal of an item whose memory was deleted."""
    return _refused("its memory was forgotten; read the conversation anew", 404, "compaction_forgotten")


def _refused(why: str, status: int, code: str) -> RequestRefused:
    return RequestRefused(f"encrypted_content: {why}", status=status, code=code, param="encrypted_content")


def read_keys(path: Path) -> list[bytes]:
    """Read from a file the keys that encrypt the tokens of compaction items.

    A compaction item is a memory saved on disk. Its token is an encrypted string, by which clients name the item. The
    file has one Fernet key per line, the newest first. If the file is missing, it is created with one new key. If
    several servers start at once, one of them creates it.

    Raises:
        SettingsRefused: the file cannot be read or created, or holds no valid keys.

    """
    try:
        if not path.exists():
            _make_key(path)
        keys = path.read_bytes().split()
        for key in keys:
            Fernet(key)
    except (OSError, ValueError) as error:
        raise SettingsRefused(
            f"item key file {path}: {error}; give one 32-byte key in URL-safe base64 a line, the newest first"
        ) from None
    if not keys:
        raise SettingsRefused(f"item key file {path} holds no key; delete it to have one made")
    return keys


def _make_key(path: Path) -> None:
    """Create the file with one new key, whole from the start; do nothing if another server was faster."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        with open(os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:  # noqa: PTH123  # mode
            file.write(Fernet.generate_key() + b"\n")
        with suppress(FileExistsError):
            path.hardlink_to(scratch)  # unlike a rename, it replaces nothing
    finally:
        scratch.unlink(missing_ok=True)
