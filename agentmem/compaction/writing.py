"""Let the model write texts for its own memory: questions, facts and summaries.

The tokens of such a text take scratch slots: slots that the plan keeps free for this purpose.
"""

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
    """Let the model continue an instruction greedily; return the ids of the instruction and of the continuation.

    The tokens take scratch slots at the sequence's next positions; these slots are dropped afterwards. Writing stops
    when instruction and continuation together have ``most`` ids, or earlier after an end token (``Language.ends``). If
    ``no_repeat`` is not 0, no run of ``no_repeat`` tokens is written twice.
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
    """Return the ids that must not be written next, because they would repeat a run of tokens in ``written``.

    A run has ``length`` tokens. The list is empty if ``length`` is 0.
    """
    if length < 1 or len(written) < length:
        return []
    lead = tuple(written[len(written) - length + 1 :])
    starts = range(len(written) - length + 1)
    return [written[start + length - 1] for start in starts if tuple(written[start : start + length - 1]) == lead]
