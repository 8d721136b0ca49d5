"""Estimate the error curves of all heads at once by Fisher information, from gradients.

An *error curve* has the errors of one head at several fractions of kept slots. Compacting a head changes its attention
output. Let d be a small change of the output at one position. Let p be the model's own distribution of next tokens, and
y a next token drawn from it. Let g be the gradient of -log p(y) with respect to the output. The change d then
changes the predictions by a KL divergence of about ½ E[(g · d)²], where E is the expectation over y. E[g gᵀ] is the
Fisher information of the output. Changes at different positions are assumed to be uncorrelated.

Sources: arXiv:2602.16284 measures sensitivity curves for nonuniform head budgets; the error curves estimated here
replace them. arXiv:1801.05787 estimates the error of a pruning by Fisher information in the same way.
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
"""Errors in nats per token, by head and then by kept fraction."""


def window_curves(window: Window, layers: Sequence[int], compactor: Compactor) -> Curves:
    """Return the error curve of every head of ``layers``, in layer order.

    A curve has one error for each fraction of kept slots in ``window.terms.fractions``. The error is the estimated KL
    divergence of the model's predictions if this head alone is compacted, in nats per token.
    """
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
    """Return the gradients of -log p(y) with respect to attention outputs, ``[samples, Hq, n, dv]`` for each layer.

    y are next tokens drawn from the model's own distribution p at every position; each sample draws them anew.
    """
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
    """Return the estimated KL per token of compacting each KV head alone, ``[heads]`` float64.

    ``past`` has the context's keys, values and β with every head compacted. One attention call over ``past`` still
    gives separate estimates, because the output of a query head depends only on the slots of its own KV head.
    ``asked`` is the attention call of the tokens after the context, without compaction.

    The estimate is ½ E[(g · d)²]. Here g are ``gradients``, d is the change of the attention output by the compaction,
    and E is the mean over samples and tokens. g · d is summed over the query heads of a KV head before it is squared.
    """
    output = attended(asked.queries, asked.keys, asked.values, past, asked.scale, sinks=asked.sinks)
    change = (output - asked.output).float()
    along = (gradients.float() * change).sum(dim=-1)
    grouped = along.reshape(len(along), heads, -1, along.shape[-1]).sum(dim=2)
    losses: torch.Tensor = grouped.square_().mean(dim=(0, 2)).double() / 2
    return losses
