"""Float64 oracles, one query at a time: attention over ragged slots. Nothing of the package is imported.

Tensors may come in any dtype; they are read as float64 at once. Every function is written from its definition.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Slots:
    """One KV head: ``keys [n, d]``, ``values [n, dv]``, ``bias [n]`` (β; ``None`` is all zeros)."""

    keys: torch.Tensor
    values: torch.Tensor
    bias: torch.Tensor | None = None


@dataclass(frozen=True)
class Answer:
    """``output [Hq, q, dv]``; ``old[h] [n_h]`` and ``own[h] [q]``: attention that slots and fresh keys received."""

    output: torch.Tensor
    old: list[torch.Tensor]
    own: list[torch.Tensor]


def attention(
    queries: torch.Tensor,
    heads: list[Slots],
    fresh: list[Slots] | None,
    scale: float,
    window: int | None = None,
) -> Answer:
    """Attention of ``queries [Hq, q, d]`` over every head's slots and, causally, its fresh keys.

    ``window``: a query sees that many tokens at most, itself included; the slots are the tokens before the fresh ones.
    """
    group, count = queries.shape[0] // len(heads), queries.shape[1]
    output = torch.zeros(*queries.shape[:2], heads[0].values.shape[-1], dtype=torch.float64)
    old = [torch.zeros(len(head.keys), dtype=torch.float64) for head in heads]
    own = [torch.zeros(count, dtype=torch.float64) for _ in heads]
    for row in range(queries.shape[0]):
        head = heads[row // group]
        for token in range(count):
            first = 0 if window is None else max(0, len(head.keys) + token - window + 1)
            seen = _seen(head, None if fresh is None else fresh[row // group], token, first)
            weights = _weights(queries[row, token], seen, scale)
            output[row, token] = weights @ seen.values
            slots = max(0, len(head.keys) - first)
            old[row // group][first:] += weights[:slots]
            begin = max(0, first - len(head.keys))
            own[row // group][begin : begin + len(weights) - slots] += weights[slots:]
    return Answer(output, old, own)


def _seen(head: Slots, fresh: Slots | None, token: int, first: int) -> Slots:
    """What one query sees, in float64: slots from ``first`` on, then fresh keys up to its own."""
    bias = torch.zeros(len(head.keys)) if head.bias is None else head.bias
    keys, values, bias = head.keys.double(), head.values.double(), bias.double()
    if fresh is not None:
        keys = torch.cat((keys, fresh.keys[: token + 1].double()))
        values = torch.cat((values, fresh.values[: token + 1].double()))
        bias = torch.cat((bias, torch.zeros(token + 1, dtype=torch.float64)))
    return Slots(keys[first:], values[first:], bias[first:])


def _logits(query: torch.Tensor, seen: Slots, scale: float) -> torch.Tensor:
    assert seen.bias is not None
    return scale * (seen.keys @ query.double()) + seen.bias


def _weights(query: torch.Tensor, seen: Slots, scale: float) -> torch.Tensor:
    logits = _logits(query, seen, scale)
    exponentials = (logits - logits.max()).exp()
    return exponentials / exponentials.sum()


def log_mass(queries: torch.Tensor, head: Slots, scale: float) -> torch.Tensor:
    """``log Σ exp(scale · q·k + β)`` over one head's slots, for ``queries [group, n, d]``: ``[group, n]``."""
    seen = _seen(head, None, 0, 0)
    result = torch.zeros(queries.shape[:2], dtype=torch.float64)
    for row in range(queries.shape[0]):
        for token in range(queries.shape[1]):
            logits = _logits(queries[row, token], seen, scale)
            result[row, token] = logits.max() + (logits - logits.max()).exp().sum().log()
    return result


def padded(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, valid: list[list[bool]], scale: float
) -> torch.Tensor:
    """Causal attention of a batch ``[B, H, q, d]`` whose pads neither see nor are seen: ``[B, q, Hq, dv]``, pads 0."""
    output = torch.zeros(queries.shape[0], queries.shape[2], queries.shape[1], values.shape[-1], dtype=torch.float64)
    for row, present in enumerate(valid):
        columns = [column for column, real in enumerate(present) if real]
        fresh = [Slots(k[columns], v[columns]) for k, v in zip(keys[row], values[row], strict=True)]
        empty = [Slots(each.keys[:0], each.values[:0]) for each in fresh]
        answer = attention(queries[row][:, columns], empty, fresh, scale).output
        for index, column in enumerate(columns):
            output[row, column] = answer[:, index]
    return output
