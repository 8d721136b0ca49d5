"""The methods as units of work: what there is to measure, how, and what it comes to."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import torch

from agentmem.calibration.attention import window_shares
from agentmem.calibration.fisher import window_curves
from agentmem.calibration.loss import head_curve
from agentmem.calibration.shares import slot_gains, top_shares
from agentmem.calibration.table import Found
from agentmem.calibration.windows import Window, cut
from agentmem.errors import SettingsRefused

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from agentmem.calibration.terms import Terms
    from agentmem.contracts import Compactor
    from agentmem.hf.capture import Reader


class Work(ABC):
    """One calibration's units, each named, measured alone and kept as JSON."""

    def __init__(self, reader: Reader, ids: torch.Tensor, terms: Terms, heads: Mapping[int, int]) -> None:
        """``heads`` has the KV heads of every compacted layer."""
        self.reader, self.terms, self.heads = reader, terms, heads
        self.windows = cut(ids, terms)
        self._open: tuple[int, Window] | None = None

    def window(self, index: int) -> Window:
        """A window; the one before is let go."""
        if self._open is None or self._open[0] != index:
            self._open = None  # before the next one is read
            self._open = (index, Window(self.reader, self.windows[index], self.terms))
        return self._open[1]

    def units(self) -> list[str]:
        """What there is to measure, in order."""
        return [str(window) for window in range(len(self.windows))]

    @abstractmethod
    def measure(self, unit: str) -> Any:
        """One unit's result."""

    @abstractmethod
    def found(self, done: Mapping[str, Any]) -> Found:
        """What all units' results come to."""


class Attention(Work):
    """Shares, window by window."""

    def measure(self, unit: str) -> list[float]:
        """Shares of all heads."""
        return window_shares(self.window(int(unit)), list(self.heads))

    def found(self, done: Mapping[str, Any]) -> Found:
        """Their mean."""
        return Found(_mean([done[unit] for unit in self.units()]).tolist())


class Curved(Work):
    """Error curves, and the shares that lower their sum most."""

    def __init__(
        self, reader: Reader, ids: torch.Tensor, terms: Terms, heads: Mapping[int, int], compactor: Compactor
    ) -> None:
        super().__init__(reader, ids, terms, heads)
        self.compactor = compactor

    def _found(self, errors: torch.Tensor) -> Found:
        errors = errors.flip(-1).cummax(dim=-1).values.flip(-1)  # more slots never cost more
        curves: list[list[float]] = errors.tolist()
        gains = [slot_gains(self.terms.fractions, curve, self.terms.segment) for curve in curves]
        return Found(top_shares(gains, self.terms.ratios), curves)


class Fisher(Curved):
    """All heads' curves at once, window by window."""

    def measure(self, unit: str) -> list[list[float]]:
        """Curves of all heads."""
        return window_curves(self.window(int(unit)), list(self.heads), self.compactor)

    def found(self, done: Mapping[str, Any]) -> Found:
        """Their mean over the windows."""
        return self._found(_mean([done[unit] for unit in self.units()]))


class Loss(Curved):
    """One head's curve at a time."""

    def units(self) -> list[str]:
        """Every head of every layer in every window."""
        heads = [(layer, head) for layer, count in self.heads.items() for head in range(count)]
        return [f"{window}.{layer}.{head}" for window in range(len(self.windows)) for layer, head in heads]

    def measure(self, unit: str) -> list[float]:
        """One head's curve."""
        window, layer, head = map(int, unit.split("."))
        return head_curve(self.window(window), layer, head, self.compactor)

    def found(self, done: Mapping[str, Any]) -> Found:
        """Their mean over the windows."""
        curves = torch.tensor([done[unit] for unit in self.units()], dtype=torch.float64)
        return self._found(curves.reshape(len(self.windows), -1, curves.shape[-1]).mean(dim=0))


def make_work(
    reader: Reader, ids: torch.Tensor, terms: Terms, heads: Mapping[int, int], compactor: Compactor | None
) -> Work:
    """The work of ``terms.method``.

    Raises:
        SettingsRefused: the method measures a compactor, and the policy has none, or one that needs a past.

    """
    if terms.method == "attention":
        return Attention(reader, ids, terms, heads)
    if compactor is None:
        raise SettingsRefused(
            f"policy: {terms.policy!r} never compacts, so {terms.method!r} has nothing to measure; name another"
        )
    if compactor.scores == "received":
        raise SettingsRefused(
            f"policy: {terms.policy!r} keeps slots by the attention received since they came, which no window has; "
            "name another, such as am-halving, for the table"
        )
    return (Fisher if terms.method == "fisher" else Loss)(reader, ids, terms, heads, compactor)


def _mean(results: Sequence[Any]) -> torch.Tensor:
    return torch.tensor(results, dtype=torch.float64).mean(dim=0)
