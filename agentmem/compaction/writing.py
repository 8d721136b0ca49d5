"""Let the model write texts for its own memory in scratch slots: questions, facts and summaries."""

from __future__ import annotations

from typing import TYPE_CHECKING

from agentmem.memory.forwards import Scratch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from agentmem.memory.forwards import Forwards
    from agentmem.memory.memory import Memory
    from agentmem.memory.sequence import TokenSequence


def write(
    memory: Memory,
    forwards: Forwards,
    sequence: TokenSequence,
    instruction: Sequence[int],
    most: int,
    *,
    no_repeat: int = 0,
) -> tuple[int, ...]:
    """Return an instruction and the text that the model writes greedily after it, together at most ``most`` tokens.

    The tokens take scratch slots at the sequence's next positions; these slots are dropped afterwards. The text ends
    early at a token that ends a text. If ``no_repeat`` is not 0, no run of ``no_repeat`` tokens is written twice.
    """
    ends = () if memory.language is None else memory.language.ends
    step, written, fed = Scratch(memory, sequence), list(instruction), 0
    try:
        while len(written) < most and (fed < len(instruction) or written[-1] not in ends):
            memory.boundary()
            piece = written[fed : fed + memory.plan.chunk]
            scores = forwards.next_logits(piece, sequence.next_position + fed, step)
            fed += len(piece)
            if fed == len(written):
                scores[repeats(written[len(instruction) :], no_repeat)] = float("-inf")
                written.append(int(scores.argmax()))
    finally:
        step.rollback()
    return tuple(written)


def repeats(written: Sequence[int], length: int) -> list[int]:
    """Return the ids which, written next, would repeat a run of ``length`` tokens that the text already contains.

    The list is empty if ``length`` is 0.
    """
    if length < 1 or len(written) < length:
        return []
    lead = tuple(written[len(written) - length + 1 :])
    starts = range(len(written) - length + 1)
    return [written[start + length - 1] for start in starts if tuple(written[start : start + length - 1]) == lead]
