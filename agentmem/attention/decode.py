"""Decode steps in compiled code: one token of each of several sequences over its own slots, in one call.

Shapes: queries ``[n, Hq, d]``, a row a sequence; the slots of a sequence are described by a :class:`Layout`.
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
_QUANTISED = 3  # rows of quantised.py, likewise


class Form(NamedTuple):
    """What the slots of one layer have in common."""

    dtype: torch.dtype
    heads: int
    key_dim: int
    value_dim: int
    quantised: bool = False
    """Whether slots are rows of :mod:`agentmem.attention.quantised`; queries and outputs are of ``dtype``."""

    @property
    def served(self) -> bool:
        """Whether the compiled code is there, and made for such slots: dims of whole vectors, or whole groups."""
        whole = quantised.GROUPS[0] if self.quantised else _VECTOR
        return COMPILED and self.dtype in _KINDS and not self.key_dim % whole and not self.value_dim % whole


def form_of(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, *, quantised: bool = False) -> Form | None:
    """The form of the slots that fresh ``keys [n, Hkv, d]`` and ``values [n, Hkv, dv]`` become.

    ``None`` where :func:`attend_each` does not take them.
    """
    rows, heads, dim = keys.shape
    if not (queries.is_cpu and keys.is_cpu and values.is_cpu and keys.dtype == queries.dtype == values.dtype):
        return None
    if queries.shape[::2] != (rows, dim) or values.shape[:2] != (rows, heads) or queries.shape[1] % heads:
        return None
    form = Form(keys.dtype, heads, dim, values.shape[2], quantised)
    return form if form.served else None


class Layout(NamedTuple):
    """Where the slots of each KV head of a sequence lie, and what keeps them there."""

    heads: bytes
    """Four uint64 a head: addresses of keys, values and β (0: there is none), and the slots there is room for."""
    form: Form
    storages: tuple[torch.Tensor | None, ...]
    """Not freed while anybody has this."""


Sequence = tuple[int, Layout, list[int], bool]
"""Its row in the queries, its layout, the slots that each head has filled, and whether they carry a β."""


def layout(heads: Iterable[tuple[int, int, int, int]], form: Form, *storages: torch.Tensor | None) -> Layout:
    """The layout of heads given as addresses of keys, values and β, and their room: of plain CPU tensors only."""
    return Layout(array("Q", [number for head in heads for number in head]).tobytes(), form, storages)


def step_bytes(layer: LayerShape, sequences: int, itemsize: int) -> int:
    """Bytes that :func:`attend_each` allocates besides its output: its scratch, and copies of rows that lie apart."""
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
    """Attend with one token of each sequence, ``queries [n, Hq, d]``, into ``output [n, Hq, dv]``, which lies together.

    The sequences have one form, which is served, and rows that no sequence names are left alone. ``fresh`` keys
    ``[n, Hkv, d]`` and values ``[n, Hkv, dv]`` are first written behind the slots that are filled and count as filled
    in this call; without them the slots are taken as they are. ``window``: only so many of the last slots are seen.
    All tensors are plain ones on the CPU, in the form's dtype.

    Raises:
        ValueError: a head without slots, or without room for one more; nothing was written.

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
        _QUANTISED if form.quantised else _KINDS[form.dtype],
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
    """With the numbers of a row one behind the other."""
    return rows if rows.stride(2) == 1 else rows.contiguous()


def _place(rows: torch.Tensor | None) -> tuple[int, tuple[int, ...]]:
    """The address of rows ``[n, h, d]``, and the numbers from one row, and from one head, to the next."""
    return (0, (0, 0)) if rows is None else (rows.data_ptr(), rows.stride()[:2])
