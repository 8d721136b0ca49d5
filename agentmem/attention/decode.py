"""Run decode steps in compiled code: one call computes the attention of several sequences, for one token of each.

Each token attends to the slots of its own sequence. Queries are ``[n, Hq, d]``, one row per sequence. A :class:`Layout`
describes where a sequence's slots are in memory.
"""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING, NamedTuple

import torch

from agentmem.attention import quantised

try:
    from agentmem.attention import _decode

    COMPILED = True
except ImportError:  # installed without a C compiler, or not on Linux
    COMPILED = False

if TYPE_CHECKING:
    from collections.abc import Iterable

    from agentmem.planning.model_shape import LayerShape

_VECTOR = 16  # floats that decode.c works on at a time
_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # dtypes that decode.c reads, by its own numbers
_CODES = {8: 3, 4: 4}  # the numbers by which decode.c knows rows of quantised.py, for each number of bits


class Form(NamedTuple):
    """The dtype, number of KV heads and dims that all slots of one layer share."""

    dtype: torch.dtype
    heads: int
    key_dim: int
    value_dim: int
    bits: tuple[int, int] = (0, 0)
    """The bits of the codes of keys and of values, if these are rows of :mod:`agentmem.attention.quantised`; else 0.

    Queries and outputs have ``dtype`` even then.
    """

    @property
    def served(self) -> bool:
        """True if the compiled code is installed and supports this dtype and these dims."""
        whole = quantised.GROUPS[0] if any(self.bits) else _VECTOR
        return COMPILED and self.dtype in _KINDS and not self.key_dim % whole and not self.value_dim % whole


def form_of(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, bits: tuple[int, int] = (0, 0)
) -> Form | None:
    """Return the dtype, number of KV heads and dims of the slots in which the given keys and values will be stored.

    Each of ``n`` sequences gets one new token. The new tokens have ``queries [n, Hq, d]``, ``keys [n, Hkv, d]`` and
    ``values [n, Hkv, dv]``. ``bits`` are those of the codes of keys and of values that slots store, 0 if they
    are not quantised. The result is ``None`` if :func:`attend_each` cannot attend with these queries over such slots.
    """
    rows, heads, dim = keys.shape
    if not (queries.is_cpu and keys.is_cpu and values.is_cpu and keys.dtype == queries.dtype == values.dtype):
        return None
    if queries.shape[::2] != (rows, dim) or values.shape[:2] != (rows, heads) or queries.shape[1] % heads:
        return None
    form = Form(keys.dtype, heads, dim, values.shape[2], bits)
    return form if form.served else None


class Layout(NamedTuple):
    """The memory addresses of the slots of each KV head of a sequence, with the tensors that own this memory."""

    heads: bytes
    """Four uint64 per head: the addresses of keys, values and β (0 if there is no β), and the capacity in slots."""
    form: Form
    storages: tuple[torch.Tensor | None, ...]
    """The tensors that own the memory, so that it is not freed while the layout exists."""


Sequence = tuple[int, Layout, list[int], bool]
"""The row of a sequence in the queries, its layout, the filled slots of each head, and whether slots have a β."""


def layout(heads: Iterable[tuple[int, int, int, int]], form: Form, *storages: torch.Tensor | None) -> Layout:
    """Return the :class:`Layout` that tells the compiled code where the slots of a sequence are in memory.

    ``heads`` lists four numbers for each KV head: the CPU addresses of keys, values and β, and the capacity in slots.
    The address of β is 0 if there is no β. ``storages`` are the tensors that own the memory at these addresses.
    """
    return Layout(array("Q", [number for head in heads for number in head]).tobytes(), form, storages)


def step_bytes(layer: LayerShape, sequences: int, itemsize: int) -> int:
    """Return the bytes that :func:`attend_each` allocates: working memory, and contiguous copies of its inputs."""
    if not COMPILED:
        return 0
    rows = layer.query_heads * layer.key_dim + layer.kv_heads * (layer.key_dim + layer.value_dim)
    scratch = _decode.scratch_bytes(
        sequences, layer.kv_heads, layer.group, layer.key_dim, layer.value_dim, torch.get_num_threads()
    )
    return scratch + sequences * rows * itemsize


def attend_each(
    queries: torch.Tensor,
    sequences: list[Sequence],
    scale: float,
    output: torch.Tensor,
    fresh: tuple[torch.Tensor, torch.Tensor] | None = None,
    window: int | None = None,
) -> None:
    """Attend with one token of each sequence, ``queries [n, Hq, d]``, and write contiguous ``output [n, Hq, dv]``.

    All sequences must have the same :class:`Form`, and its ``served`` must be true. All tensors must be on the CPU and
    have the dtype of the form.

    Args:
        queries: one row per sequence.
        sequences: the sequences to attend to, each with its row in ``queries`` and ``output``; see :data:`Sequence`.
            Other rows of ``output`` are not written.
        scale: factor on the attention logits.
        output: the tensor to write to.
        fresh: new keys ``[n, Hkv, d]`` and values ``[n, Hkv, dv]``, which are first written to the slots after the
            filled slots and are attended to. With ``None`` only the filled slots are attended to.
        window: the number of newest slots that are attended to; ``None`` for all.

    Raises:
        ValueError: a head has no slots, or no room for one more; nothing was written.

    """
    form = sequences[0][1].form
    rows, query_heads, dim = queries.shape
    group, threads = query_heads // form.heads, torch.get_num_threads()
    count = _decode.scratch_bytes(len(sequences), form.heads, group, dim, form.value_dim, threads)
    scratch = torch.empty(count, dtype=torch.uint8, device="cpu")
    queries = _together(queries)
    keys, values = (None, None) if fresh is None else map(_together, fresh)
    _decode.attend(
        _KINDS[form.dtype],
        _CODES.get(form.bits[0], _KINDS[form.dtype]),
        _CODES.get(form.bits[1], _KINDS[form.dtype]),
        threads,
        scale,
        window or 0,
        rows,
        form.heads,
        group,
        form.key_dim,
        form.value_dim,
        *_place(queries),
        *_place(keys),
        *_place(values),
        output.data_ptr(),
        scratch.data_ptr(),
        count,
        sequences,
    )


def _together(rows: torch.Tensor) -> torch.Tensor:
    """Return ``rows``, or a contiguous copy if their last dimension is not contiguous."""
    return rows if rows.stride(2) == 1 else rows.contiguous()


def _place(rows: torch.Tensor | None) -> tuple[int, tuple[int, ...]]:
    """Return the address of the tensor ``rows [n, h, d]`` and its strides over ``n`` and ``h``, in elements.

    If ``rows`` is ``None``, all these numbers are 0.
    """
    return (0, (0, 0)) if rows is None else (rows.data_ptr(), rows.stride()[:2])
