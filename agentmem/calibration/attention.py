"""Compute the shares of heads from attention scores.

The slots that receive most attention are chosen over all heads together. A head's *share* is the number of its chosen
slots, divided by the mean number per head. The method needs no gradient.

Sources: arXiv:2602.16284, method "highest attention", for the scores, which are root mean squares of attention weights;
Ada-KV, arXiv:2407.11550, for the allocation over all heads.
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
    """Return the share of every head of ``layers``, layer by layer.

    The slots that receive most attention are kept, over all heads together. A head's share is the number of its kept
    slots, divided by the mean number per head. The mean of all shares is therefore 1. Shares are averaged over the
    fractions of kept slots in ``window.terms.ratios``.
    """
    scores = []
    for layer in layers:
        segment = window.segment(layer)
        scores += [
            rms_weights(segment.queries(head)[0], heads.keys, segment.scale) for head, heads in enumerate(segment.heads)
        ]
    return top_shares(scores, window.terms.ratios)


def rms_weights(queries: torch.Tensor, keys: torch.Tensor, scale: float) -> torch.Tensor:
    """Return each key's root mean square attention weight over all ``queries [group, n, d]``, ``[T]`` float32.

    The softmax is taken over the given ``keys [T, d]`` alone.
    """
    flat, squares = queries.flatten(0, 1), keys.new_zeros(len(keys), dtype=torch.float32)
    for part in blocks(len(flat), _ROWS):
        logits = scale * (flat[part].float() @ keys.float().T)
        squares += logits.softmax(dim=-1).square_().sum(dim=0)
    return squares.div_(len(flat)).sqrt_()
