"""Run a model over a text and record the inputs and output of every attention call, for calibration and checks.

These forwards use no cache of transformers. To continue a text, the caller records a forward over the beginning of the
text, and passes this record to the next forward as ``past``. The caller may first change the keys and values in the
record, for example by a compaction. At the end, the model is as before.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from agentmem.errors import UnsupportedModel
from agentmem.hf.forward_context import FRAME, Frame, own_frame, rename, restore

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """One recorded attention call of one layer: ``queries [Hq, n, d]``, ``keys [H, n, d]``, ``values [H, n, dv]``.

    Queries and keys have RoPE applied and are in the model's dtype. ``output [Hq, n, dv]`` is the result of the call.
    A record can be given to a later forward as ``past`` (see :meth:`Reader.read`). The tokens of that forward then
    attend to the record's keys as well, and ``bias [H, n]`` float32 is added to the logits of these keys; -inf hides a
    key. ``sinks [Hq]`` are attention sinks: one extra logit per query head, without a key or value. ``None`` means that
    the model has no sinks.
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
    """The record of one forward: the attention call of every layer, and the logits ``[n, V]`` if requested."""

    layers: tuple[AttentionCall, ...]
    logits: torch.Tensor | None = None


class Reader:
    """A model whose attention calls are recorded while it reads tokens; :func:`reading` makes objects of this class."""

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
        """Run the model over ``ids [n]`` at positions ``start, start + 1, …`` and return the recorded calls.

        ``past`` has one record per layer; the tokens also attend to the keys and values of these records. With
        ``logits``, the result contains logits. With ``gradient``, the logits can be differentiated with respect to
        every layer's ``output``, but not with respect to ``past``.
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
    """A :class:`agentmem.hf.forward_context.Step` that computes attention as the model would and records each call."""

    memories = ()

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
        """Attend with ``queries [1, Hq, n, d]`` and record the call; return ``[1, n, Hq, dv]``."""
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
    """Compute causal attention of ``queries [Hq, n, d]`` over the keys of ``past`` followed by ``keys [H, n, d]``.

    ``values`` are ``[H, n, dv]`` and the result is ``[Hq, n, dv]``. ``window`` is the layer's sliding window; ``None``
    is full attention.
    """
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
    if sinks is not None:  # a key of zeros: its logit is the sink, which the mask adds
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
    """Return a mask ``[count, before + count]``, true for the keys that each of the ``count`` newest tokens sees."""
    key, query = (
        torch.arange(before + count, device=device),
        torch.arange(before, before + count, device=device)[:, None],
    )
    seen = key <= query
    return seen if window is None else seen & (key > query - window)


@contextmanager
def reading(model: PreTrainedModel, windows: Sequence[int | None]) -> Iterator[Reader]:
    """Yield a :class:`Reader` of a causal model.

    ``windows`` has the sliding window of each layer; ``None`` is full attention. In the block, the model's weights
    require no gradients; the end of the block restores the model.
    """
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    config, key = model.get_decoder().config, object()
    try:
        rename(config, key)
        for parameter in wanted:
            parameter.requires_grad = False
        yield Reader(model, windows)
    finally:
        for parameter in wanted:
            parameter.requires_grad = True
        restore(config, key)
