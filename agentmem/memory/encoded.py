"""The segment of a head whose keys and values are quantised: they are decoded when a policy reads them."""

from __future__ import annotations

from typing import TYPE_CHECKING
from weakref import ref

from agentmem.contracts import HeadSegment

if TYPE_CHECKING:
    import torch

    from agentmem.memory.slot_spec import SlotSpec


class EncodedHead(HeadSegment):
    """Quantised slots of one KV head; every reading of ``keys`` or ``values`` decodes them, in ``spec.dtype``.

    While the tensor of an earlier reading is still in use, a reading returns that tensor instead.
    """

    __slots__ = ("_decoded", "encoded", "spec")

    encoded: HeadSegment
    """The same slots with encoded rows ``[T, row_bytes]`` (uint8) as keys and values."""
    spec: SlotSpec
    _decoded: dict[str, ref[torch.Tensor]]

    def __init__(self, encoded: HeadSegment, spec: SlotSpec) -> None:
        """Decode nothing yet."""
        for name in ("bias", "positions", "scores"):
            object.__setattr__(self, name, getattr(encoded, name))
        for name, given in (("encoded", encoded), ("spec", spec), ("_decoded", {})):
            object.__setattr__(self, name, given)

    @property
    def keys(self) -> torch.Tensor:
        """Return the decoded keys ``[T, d]``."""
        return self._rows("keys", 0)

    @property
    def values(self) -> torch.Tensor:
        """Return the decoded values ``[T, dv]``."""
        return self._rows("values", 1)

    @property
    def key_dim(self) -> int:
        """Return d, the dimension of a key."""
        return self.spec.shape.key_dim

    @property
    def value_dim(self) -> int:
        """Return dv, the dimension of a value."""
        return self.spec.shape.value_dim

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of decoded keys and values."""
        return self.spec.dtype

    def _rows(self, name: str, which: int) -> torch.Tensor:
        known = self._decoded.get(name)
        rows = None if known is None else known()
        if rows is None:
            assert self.spec.shape.formats is not None  # noqa: S101  # only quantised slots are read so
            rows = self.spec.shape.formats[which].decode_rows(getattr(self.encoded, name), self.spec.dtype)
            self._decoded[name] = ref(rows)
        return rows
