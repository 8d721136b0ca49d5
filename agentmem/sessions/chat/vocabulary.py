"""Text into ids outside the chat template, and the check that every id is one of the model's before it is taken."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from agentmem.errors import SettingsRefused
from agentmem.sessions.arguments import check_encodable

if TYPE_CHECKING:
    from agentmem.sessions.conversation import Conversation

_SHOWN = 4


def tokens(session: Conversation, field: str, text: str) -> list[int]:
    """Ids of a text as it is, without special tokens of the tokenizer's own.

    Raises:
        SettingsRefused: it cannot be encoded, or the tokenizer makes ids of it that the model does not know.

    """
    check_encodable(field, text)
    ids = list(session.tokenizer(text, add_special_tokens=False)["input_ids"])
    check_known(session, field, ids)
    return ids


def check_known(session: Conversation, field: str, ids: Iterable[int]) -> None:
    """Refuse ids that the model has no embedding for: a forward would fail on them, or read a wrong one.

    Raises:
        SettingsRefused: names the first ones.

    """
    words = session.memory.shape.vocabulary
    wrong = [each for each in ids if not 0 <= each < words]
    if wrong:
        raise SettingsRefused(
            f"{field}: {wrong[:_SHOWN]} are no ids of this model, which knows 0..{words - 1}; use the tokenizer that "
            "belongs to the model, or model.resize_token_embeddings(len(tokenizer)) before the runtime is made"
        )
