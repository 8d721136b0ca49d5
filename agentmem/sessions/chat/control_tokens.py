"""Tokenizing of rendered chats, in which a message cannot produce control tokens by containing their text.

A delta (the new part of a rendered chat) is tokenized as a whole, as transformers does it. Therefore a boundary between
markup and content does not change any token.

The exception is a message that contains the text of a control token, such as ``<|im_end|>`` in a tool's output. Before
the chat is rendered, a mark is inserted after the first character of this text. The rendered text is then cut at the
mark, and the two pieces are tokenized separately. Neither piece contains the whole text of the control token, so the
tokenizer reads it as plain text, and the words of the message stay unchanged.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from typing import TYPE_CHECKING, Any

from agentmem.errors import SettingsRefused
from agentmem.sessions.arguments import check_encodable

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

_CONTEXT = 32
_TRUSTED = ("system", "assistant")


def _pattern(texts: Iterable[str]) -> re.Pattern[str]:
    longest_first = sorted(texts, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


class Markup:
    """The control tokens of one tokenizer and one template, and the tokenizing of rendered chats.

    If a message contains the text of a control token, this text is tokenized as plain text, not as the control token.
    The role of the message decides what counts as a control token:

    - system, assistant: the special tokens of the tokenizer.
    - user, tool: the special tokens, and also other added tokens that the template's source contains, such as
      ``<tool_call>`` and ``</think>``.
    """

    def __init__(self, tokenizer: Any, source: str, mark: str) -> None:
        """Collect the control tokens.

        ``source`` is the template's source, and ``mark`` is a text that occurs in no message.
        """
        self.tokenizer, self.mark = tokenizer, mark
        added = tokenizer.added_tokens_decoder.values()
        special = {token.content for token in added if token.special} | set(tokenizer.all_special_tokens)
        written = {token.content for token in added if token.content in source and not token.content.isspace()}
        self._special, self._every = _pattern(special), _pattern(special | written)

    def neutral(self, value: Any, role: str) -> Any:
        """Return ``value`` with a mark inside the text of every control token, so that this text stays plain text.

        ``value`` is a text, or a list or dict that contains texts. ``role`` is the role of the message that contains
        ``value``.

        Raises:
            SettingsRefused: a text contains a control token of one character, which cannot be cut.

        """
        if isinstance(value, str):
            pattern = self._special if role in _TRUSTED else self._every
            return self._marked(value, pattern) if pattern.search(value) else value
        if isinstance(value, dict):
            return {self.neutral(key, role): self.neutral(item, role) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.neutral(item, role) for item in value]
        return value

    def _marked(self, text: str, pattern: re.Pattern[str]) -> str:
        pieces, done, found = [], 0, pattern.search(text)
        while found:
            if len(found.group()) == 1:
                raise SettingsRefused(
                    f"a message contains {found.group()!r}, a control token of one character, which cannot be written "
                    "as plain text. Replace it before the message is given."
                )
            pieces.append(text[done : found.start() + 1])
            done = found.start() + 1
            found = pattern.search(text, done)  # from the second character on, since matches may overlap
        return self.mark.join([*pieces, text[done:]])

    def common(self, *texts: str) -> int:
        """Return how many characters at the beginning are the same in all texts.

        The number is reduced if the common beginning would end inside a control token of any of the texts.
        """
        first, last = min(texts), max(texts)  # in sorted order, the texts between these two share their beginning
        differing = (at for at, (one, other) in enumerate(zip(first, last, strict=False)) if one != other)
        size = next(differing, len(first))
        for _ in texts:  # stepping back in one text may land inside a token of another
            for text in texts:
                crossed = (found.start() for found in self._every.finditer(text) if found.start() < size < found.end())
                size = min(crossed, default=size)
        return size

    def words(self, text: str) -> bool:
        """Return True if the text contains anything besides control tokens and white space."""
        return bool(self._every.sub("", text).strip())

    def encode(self, text: str, bounds: Sequence[int] = (), before: str = "") -> tuple[tuple[int, ...], list[int]]:
        """Return the ids of ``text``, and for each bound the index of the first id whose token ends after the bound.

        ``bounds`` are character indices of ``text``, and must ascend. ``before`` is the text that the memory holds just
        before ``text``. It is needed because some tokenizers encode a word differently at the beginning of a text.
        """
        cuts = [found.span() for found in re.finditer(re.escape(self.mark), text)]
        if not self.tokenizer.is_fast:  # there are no offsets, so the text is cut at the bounds, too
            cuts = sorted([*cuts, *((bound, bound) for bound in bounds)])
        ids: list[int] = []
        stops: list[int] = []  # ends, not starts: some tokenizers trim a token's leading spaces from its offsets
        place, context = 0, before.replace(self.mark, "")[-_CONTEXT:]
        for start, stop in [*cuts, (len(text), len(text))]:
            some, ends = self._piece(text[place:start], context)
            ids += some
            stops += [place + end for end in ends]
            place, context = stop, "\n" if stop > start else text[max(0, start - _CONTEXT) : start]
        return tuple(ids), [bisect_right(stops, bound) for bound in bounds]

    def _piece(self, text: str, context: str) -> tuple[list[int], list[int]]:
        """Return the ids of a text that follows ``context``, and the end offset of each id.

        If the tokenizer does not give offsets, each end offset is the length of the text.
        """
        if not text:
            return [], []
        if context and not self._every.match(text):
            ids, stops = self._tokens(context + text)
            known, _ = self._tokens(context)
            if ids[: len(known)] == known:
                return ids[len(known) :], [stop - len(context) for stop in stops[len(known) :]]
        return self._tokens(text)

    def _tokens(self, text: str) -> tuple[list[int], list[int]]:
        fast = bool(self.tokenizer.is_fast)
        check_encodable("chat_template: the text that it writes", text)
        made = self.tokenizer(
            text, add_special_tokens=False, split_special_tokens=False, return_offsets_mapping=fast, verbose=False
        )
        ids = list(made["input_ids"])
        return ids, [stop for _, stop in made["offset_mapping"]] if fast else [len(text)] * len(ids)
