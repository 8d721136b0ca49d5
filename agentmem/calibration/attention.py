"""Shares by attention: which heads' slots are among the most attended of all heads and layers. One pass, no gradient.

Source: arXiv:2602.16284, scores of "highest attention" (rms); allocated over all heads as in Ada-KV, arXiv:2407.11550.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from agentmem.calibration.shares import top_shares
from agentmem.contracts import blocks

if TYPE_CHECKING:
    from collections.abc import Sequence

    from agentmem.calibration.windows import Window

_ROWS = 256


def window_shares(window: Window, layers: Sequence[int]) -> list[float]:
    """Shares of all heads of the layers, in order, in equal shares."""
    scores = []
    for layer in layers:
        segment = window.segment(layer)
        scores += [
            rms_weights(segment.queries(head)[0], heads.keys, segment.scale) for head, heads in enumerate(segment.heads)
        ]
    return top_shares(scores, window.terms.ratios)


def rms_weights(queries: torch.Tensor, keys: torch.Tensor, scale: float) -> torch.Tensor:
    """Root mean square over ``queries [group, n, d]`` of the attention weight on each of ``keys [T, d]``: ``[T]``.

    Weights are relative to these keys alone, float32.
    """
    flat, squares = queries.flatten(0, 1), keys.new_zeros(len(keys), dtype=torch.float32)
    for part in blocks(len(flat), _ROWS):
        logits = scale * (flat[part].float() @ keys.float().T)
        squares += logits.softmax(dim=-1).square_().sum(dim=0)
    return squares.div_(len(flat)).sqrt_()
