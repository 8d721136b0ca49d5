"""Measure error curves: compact one head, leave all others as they are, and take the KL of the tokens that follow.

The method is exact, and slow.

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
    """Return KL(uncompacted ‖ one head compacted) in nats per token, at every one of ``terms.fractions``."""
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
        assert logits is not None  # noqa: S101  # the same
        found = logits.float().log_softmax(dim=-1)
        kl = torch.nn.functional.kl_div(found, reference, reduction="batchmean", log_target=True)
        errors.append(max(0.0, float(kl)))
    return errors
