"""Tokenizing of text outside the chat template, and the check that the model knows every id."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from agentmem.sessions.arguments import check_encodable

if TYPE_CHECKING:
    from agentmem.sessions.conversation import Conversation


def tokens(session: Conversation, field: str, text: str) -> list[int]:
    """Return the ids of a text, without the special tokens that the tokenizer would add.

    Raises:
        SettingsRefused: the text cannot be encoded, or some of its ids are unknown to the model.

    """
    check_encodable(field, text)
    ids = list(session.tokenizer(text, add_special_tokens=False)["input_ids"])
    check_known(session, field, ids)
    return ids


def check_known(session: Conversation, field: str, ids: Iterable[int]) -> None:
    """Check that the model has an embedding for each id; a forward of other ids would fail or use a wrong embedding.

    Raises:
        SettingsRefused: some ids are unknown; the message names the first of them.

    """
    session.memory.shape.check_ids(field, ids)
