"""Error curves by Fisher information: what a head's compaction costs, from gradients; all heads in one pass.

A small change d of the attention output at a position changes the distributions that follow by KL ≈ ½ E (g · d)², with
g the gradient of -log p(y) for the output and y drawn from the model itself: the Fisher information of the output.
Changes at different positions are taken to be unrelated.

Source: the curves replace the measured sensitivity curves of arXiv:2602.16284, nonuniform head budgets; the estimate
of a pruning's cost by Fisher information is that of arXiv:1801.05787.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from agentmem.hf.capture import AttentionCall, attended

if TYPE_CHECKING:
    from collections.abc import Sequence

    from agentmem.calibration.windows import Window
    from agentmem.contracts import Compactor

Curves = list[list[float]]
"""Errors by head and fraction, in nats per token."""


def window_curves(window: Window, layers: Sequence[int], compactor: Compactor) -> Curves:
    """Each head's curve over ``terms.fractions``, all other heads untouched; heads of the layers in order."""
    gradients = _gradients(window, layers)
    curves: Curves = []
    for layer, drawn in zip(layers, gradients, strict=True):
        segment = window.segment(layer, scores=compactor.scores != "none")
        heads = len(segment.heads)
        errors = []
        for fraction in window.terms.fractions:
            past = window.compact(segment, compactor, [window.kept(fraction)] * heads)
            errors.append(_losses(window.ahead.layers[layer], past, drawn, heads))
        curves += torch.stack(errors, dim=1).tolist()
    return curves


def _gradients(window: Window, layers: Sequence[int]) -> list[torch.Tensor]:
    """For each layer ``[samples, Hq, n, dv]``: gradients of -log p(y), y drawn anew for every sample."""
    logits = window.ahead.logits
    assert logits is not None  # noqa: S101  # the window asks for them
    outputs = [window.ahead.layers[layer].output for layer in layers]
    generator = torch.Generator().manual_seed(window.terms.seed)
    log_p = logits.float().log_softmax(dim=-1)
    found = []
    for sample in range(window.terms.samples):
        drawn = torch.multinomial(log_p.detach().exp().cpu(), 1, generator=generator).to(logits.device)
        loss = -log_p.gather(-1, drawn).sum()
        more = sample + 1 < window.terms.samples
        found.append(torch.autograd.grad(loss, outputs, retain_graph=more))
    return [torch.stack(layer) for layer in zip(*found, strict=True)]


@torch.no_grad()
def _losses(asked: AttentionCall, past: AttentionCall, gradients: torch.Tensor, heads: int) -> torch.Tensor:
    """½ E (g · d)² per token of every KV head ``[heads]``, its group's query heads taken together."""
    output = attended(asked.queries, asked.keys, asked.values, past, asked.scale, sinks=asked.sinks)
    change = (output - asked.output).float()
    along = (gradients.float() * change).sum(dim=-1)
    grouped = along.reshape(len(along), heads, -1, along.shape[-1]).sum(dim=2)
    losses: torch.Tensor = grouped.square_().mean(dim=(0, 2)).double() / 2
    return losses
