"""Reading a text with a model while watching every attention call: what calibration is made of.

No cache of transformers is used: keys and values of a context stay with the caller, who may change them, and later
tokens are read against them. Nothing remains on the model afterwards.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from agentmem.errors import UnsupportedModel
from agentmem.hf.forward_context import FRAME, Frame, own_frame, rename

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """What one layer's attention was called with: ``queries [Hq, n, d]``, ``keys [H, n, d]``, ``values [H, n, dv]``.

    Queries and keys are post-RoPE, in the model's dtype. ``output [Hq, n, dv]`` is what it answered. ``bias [H, n]``
    float32, if any, is added to the logits of these keys when later tokens are read against them: -inf hides one.
    ``sinks [Hq]``, if any, are one more logit of each query head, which has no value.
    """

    queries: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    output: torch.Tensor
    scale: float
    bias: torch.Tensor | None = None
    sinks: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class Reading:
    """One forward: what every layer was called with, and the logits ``[n, V]`` if they were wanted."""

    layers: tuple[AttentionCall, ...]
    logits: torch.Tensor | None = None


class Reader:
    """Reads tokens with a model; see :func:`reading`."""

    def __init__(self, model: PreTrainedModel, windows: Sequence[int | None]) -> None:
        self.model, self.windows = model, tuple(windows)

    def read(
        self,
        ids: torch.Tensor,
        *,
        start: int = 0,
        past: Sequence[AttentionCall] = (),
        logits: bool = False,
        gradient: bool = False,
    ) -> Reading:
        """Read ``ids [n]`` at positions ``start ..`` against the keys and values of ``past`` and their own.

        With ``gradient`` the logits can be differentiated for every layer's ``output``; the past is constant.
        """
        step = _Watch(past, self.windows, gradient=gradient)
        inputs: dict[str, Any] = {
            "input_ids": ids[None].to(self.model.device),
            "position_ids": torch.arange(start, start + len(ids), device=self.model.device)[None],
            "use_cache": False,
        }
        with own_frame(), torch.set_grad_enabled(gradient):
            FRAME.set(Frame(None, step))
            out = self.model(**inputs) if logits else self.model.get_decoder()(**inputs)
        if len(step.layers) != len(self.windows):
            raise UnsupportedModel(
                f"{len(step.layers)} of {len(self.windows)} layers' attention was seen; read outside any capped block"
            )
        return Reading(tuple(step.layers), out.logits[0] if logits else None)


class _Watch:
    """Answers every layer's attention call as the model would, and keeps what it was called with."""

    def __init__(self, past: Sequence[AttentionCall], windows: Sequence[int | None], *, gradient: bool) -> None:
        self.past, self.windows, self.gradient = past, windows, gradient
        self.layers: list[AttentionCall] = []

    def attend(
        self,
        layer: int,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        scale: float,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """``queries [1, Hq, n, d]`` → ``[1, n, Hq, dv]``."""
        own = (queries[0], keys[0], values[0])
        past = self.past[layer] if self.past else None
        output = attended(*own, past, scale, self.windows[layer], sinks)
        if self.gradient and not output.requires_grad:
            output = output.detach().requires_grad_()
        self.layers.append(AttentionCall(*own, output, scale, sinks=sinks))
        return output.transpose(0, 1)[None].contiguous()  # some models view it in another shape


def attended(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    past: AttentionCall | None,
    scale: float,
    window: int | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention of ``queries [Hq, n, d]`` over a past and their own keys: ``[Hq, n, dv]`` in their dtype."""
    count, dtype, before = queries.shape[1], queries.dtype, 0
    bias = None
    if past is not None:
        before, bias = past.keys.shape[1], past.bias
        keys, values = torch.cat([past.keys, keys], dim=1), torch.cat([past.values, values], dim=1)
    seen = _visible(count, before, window, queries.device)
    group = queries.shape[0] // keys.shape[0]
    if bias is not None:
        queries, keys, values = queries.float(), keys.float(), values.float()
        added = torch.zeros(keys.shape[0], 1, before + count, dtype=torch.float32, device=queries.device)
        added[:, 0, :before] = bias
        seen = added.masked_fill(~seen, float("-inf")).repeat_interleave(group, dim=0)
    if sinks is not None:  # a key of zeros, whose logit is the mask's
        keys, values = (torch.nn.functional.pad(each, (0, 0, 0, 1)) for each in (keys, values))
        masked = (
            seen if seen.is_floating_point() else torch.zeros_like(seen, dtype=dtype).masked_fill(~seen, -torch.inf)
        )
        column = sinks.to(masked.dtype).view(-1, 1, 1).expand(-1, count, 1)
        seen = torch.cat((masked.expand(len(sinks), count, -1), column), -1)
    return scaled_dot_product_attention(
        queries[None], keys[None], values[None], attn_mask=seen, scale=scale, enable_gqa=group > 1
    )[0].to(dtype)


def _visible(count: int, before: int, window: int | None, device: torch.device) -> torch.Tensor:
    """``[n, before + n]``: which keys each of the newest tokens sees."""
    key, query = (
        torch.arange(before + count, device=device),
        torch.arange(before, before + count, device=device)[:, None],
    )
    seen = key <= query
    return seen if window is None else seen & (key > query - window)


@contextmanager
def reading(model: PreTrainedModel, windows: Sequence[int | None]) -> Iterator[Reader]:
    """A reader of a causal model whose layers have these sliding windows (``None`` for full attention).

    The model computes no gradient of its weights meanwhile, and is as it was afterwards.
    """
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    undo = rename(model.get_decoder().config)
    try:
        for parameter in wanted:
            parameter.requires_grad = False
        yield Reader(model, windows)
    finally:
        for parameter in wanted:
            parameter.requires_grad = True
        undo()
