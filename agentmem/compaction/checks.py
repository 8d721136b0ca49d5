"""Check the result of a compactor before it replaces the slots of a layer."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from agentmem.contracts import Compaction, HeadCompaction, HeadSegment, Segment
from agentmem.errors import PolicyContractBroken


def validate(compaction: Compaction, segment: Segment, slots: Sequence[int], *, policy: str) -> None:
    """Check that a compactor's result satisfies the invariants of :class:`agentmem.contracts.Compactor`.

    ``slots`` has the number of slots that each head must have. The check allocates at most one byte per kept slot of
    one head.

    Raises:
        PolicyContractBroken: an invariant is violated; the message names the policy, the layer, the head, the invariant
            and the value.

    """
    where = f"policy {policy!r}, layer {segment.layer}"
    _hold(isinstance(compaction, Compaction), where, "compact() returns a Compaction", type(compaction).__name__)
    heads = compaction.heads
    _hold(len(heads) == len(slots), where, f"{len(slots)} KV heads need as many HeadCompactions", len(heads))
    for index, (result, source, count) in enumerate(zip(heads, segment.heads, slots, strict=True)):
        _validate_kept(result.kept, source.slots, count, f"{where}, head {index}")
        _validate_tensors(result, source, f"{where}, head {index}")


def _validate_kept(kept: torch.Tensor, held: int, count: int, where: str) -> None:
    _hold(kept.dtype == torch.int64, where, "kept is int64", kept.dtype)
    _hold(kept.shape == (count,), where, f"exactly {count} slots are kept", _sizes(kept))
    if count:
        low, high = int(kept[0]), int(kept[-1])
        _hold(bool((kept[:-1] < kept[1:]).all()), where, "kept is strictly ascending", "it is not")
        _hold(low >= 0 and high < held, where, f"kept lies in 0 … {held - 1}", f"{low} … {high}")


def _validate_tensors(result: HeadCompaction, source: HeadSegment, where: str) -> None:
    count = len(result.kept)
    expected = {
        "bias": (result.bias, (count,), {torch.float32}),
        "values": (result.values, (count, source.value_dim), {source.dtype, torch.float32}),
        "keys": (result.keys, (count, source.key_dim), {source.dtype, torch.float32}),
        "scores": (result.scores, (count,), {torch.float32}),
    }
    for name, (tensor, shape, dtypes) in expected.items():
        if tensor is None:
            continue
        _hold(tensor.shape == shape, where, f"{name} is {list(shape)}", _sizes(tensor))
        _hold(tensor.dtype in dtypes, where, f"{name} is {_words(dtypes)}", tensor.dtype)
        _hold(tensor.device == source.bias.device, where, f"{name} is on {source.bias.device}", tensor.device)
        if count:
            # aminmax propagates NaN and allocates nothing, whereas isfinite() would copy the tensor.
            low, high = (float(end) for end in tensor.aminmax())
            finite = math.isfinite(low) and math.isfinite(high)
            _hold(finite, where, f"{name} is finite", f"from {low} to {high}")


def _hold(invariant: bool, where: str, text: str, value: object) -> None:  # noqa: FBT001 - the invariant is the subject
    if not invariant:
        raise PolicyContractBroken(
            f"{where}: the contract says that {text}, got {value}. Nothing was committed; "
            "agentmem.testing.check_policy shows every invariant that the policy breaks"
        )


def _sizes(tensor: torch.Tensor) -> list[int]:
    return list(tensor.shape)


def _words(dtypes: set[torch.dtype]) -> str:
    return " or ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
