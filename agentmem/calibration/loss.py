"""Measure the error curve of one head: its errors at several fractions of kept slots.

To measure an error, the head is compacted, all other heads stay as they are, and the KL is computed over the tokens
that follow the context. The method is exact, but slow.

Source: arXiv:2602.16284, sensitivity curves of nonuniform head budgets.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from agentmem.calibration.windows import Window
    from agentmem.contracts import Compactor


@torch.no_grad()
def head_curve(window: Window, layer: int, head: int, compactor: Compactor) -> list[float]:
    """Return the error curve of one head: an error for each fraction of kept slots in ``window.terms.fractions``.

    An error is the KL divergence from the model's predictions without compaction to its predictions with this head
    alone compacted, in nats per token.
    """
    whole = window.untouched.logits
    assert whole is not None  # noqa: S101  # the window asks for them
    segment, errors = window.segment(layer, scores=compactor.scores != "none"), []
    reference = whole.float().log_softmax(dim=-1)
    for fraction in window.terms.fractions:
        slots = [each.slots for each in segment.heads]
        slots[head] = window.kept(fraction)
        past = list(window.context.layers)
        past[layer] = window.compact(segment, compactor, slots)
        logits = window.read_ahead(past).logits
        assert logits is not None  # noqa: S101  # the window asks for them
        found = logits.float().log_softmax(dim=-1)
        kl = torch.nn.functional.kl_div(found, reference, reduction="batchmean", log_target=True)
        errors.append(max(0.0, float(kl)))
    return errors
