"""Divide each calibration method into units of work, measure a unit, and combine the results of all units.

A unit of work is one window of the text, or one head in one window. A head's *share* is its number of slots divided by
the mean number of slots per head. A head's *error curve* lists the head's errors, in nats per token, one for each
fraction of kept slots in :attr:`agentmem.calibration.terms.Terms.fractions`.
"""

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
    """Base of the calibration methods.

    A method is divided into named units, which are measured one by one. The result of a unit can be stored as JSON.
    """

    def __init__(self, reader: Reader, ids: torch.Tensor, terms: Terms, heads: Mapping[int, int]) -> None:
        """Cut ``ids`` into windows; ``heads`` maps every compacted layer to the number of its KV heads."""
        self.reader, self.terms, self.heads = reader, terms, heads
        self.windows = cut(ids, terms)
        self._open: tuple[int, Window] | None = None

    def window(self, index: int) -> Window:
        """Return window ``index``, and free the window that was returned before if it is a different one."""
        if self._open is None or self._open[0] != index:
            self._open = None  # freed before the next window is read
            self._open = (index, Window(self.reader, self.windows[index], self.terms))
        return self._open[1]

    def units(self) -> list[str]:
        """Return the names of all units of work, in order."""
        return [str(window) for window in range(len(self.windows))]

    @abstractmethod
    def measure(self, unit: str) -> Any:
        """Measure one unit of work and return its result."""

    @abstractmethod
    def found(self, done: Mapping[str, Any]) -> Found:
        """Combine the results ``done`` of all units of work into the outcome of the calibration."""


class Attention(Work):
    """Compute each head's share of the slots from attention scores; a unit of work is one window."""

    def measure(self, unit: str) -> list[float]:
        """Return the share of every head, computed from one window.

        A share is the head's number of slots, divided by the mean number per head.
        """
        return window_shares(self.window(int(unit)), list(self.heads))

    def found(self, done: Mapping[str, Any]) -> Found:
        """Return each head's share, as the mean over all windows.

        A share is the head's number of slots, divided by the mean number per head. The result has no error curves.
        """
        return Found(_mean([done[unit] for unit in self.units()]).tolist())


class Curved(Work):
    """Base of the methods that find error curves, from which the heads' shares of the slots are computed.

    The computed shares make the sum of all heads' errors smallest.
    """

    def __init__(
        self, reader: Reader, ids: torch.Tensor, terms: Terms, heads: Mapping[int, int], compactor: Compactor
    ) -> None:
        super().__init__(reader, ids, terms, heads)
        self.compactor = compactor

    def _found(self, errors: torch.Tensor) -> Found:
        errors = errors.flip(-1).cummax(dim=-1).values.flip(-1)  # more slots never have a greater error
        curves: list[list[float]] = errors.tolist()
        gains = [slot_gains(self.terms.fractions, curve, self.terms.segment) for curve in curves]
        return Found(top_shares(gains, self.terms.ratios), curves)


class Fisher(Curved):
    """Estimate the error curves of all heads at once by Fisher information; a unit of work is one window."""

    def measure(self, unit: str) -> list[list[float]]:
        """Return the error curves of all heads in one window."""
        return window_curves(self.window(int(unit)), list(self.heads), self.compactor)

    def found(self, done: Mapping[str, Any]) -> Found:
        """Return each head's mean error curve over the windows, and each head's share, computed from all curves.

        A share is the head's number of slots, divided by the mean number per head.
        """
        return self._found(_mean([done[unit] for unit in self.units()]))


class Loss(Curved):
    """Measure the error curve of one head at a time; a unit of work is one head in one window of the text."""

    def units(self) -> list[str]:
        """Return a name ``window.layer.head`` for every head of every layer in every window."""
        heads = [(layer, head) for layer, count in self.heads.items() for head in range(count)]
        return [f"{window}.{layer}.{head}" for window in range(len(self.windows)) for layer, head in heads]

    def measure(self, unit: str) -> list[float]:
        """Return the error curve of one head in one window."""
        window, layer, head = map(int, unit.split("."))
        return head_curve(self.window(window), layer, head, self.compactor)

    def found(self, done: Mapping[str, Any]) -> Found:
        """Return each head's mean error curve over the windows, and each head's share, computed from all curves.

        A share is the head's number of slots, divided by the mean number per head.
        """
        curves = torch.tensor([done[unit] for unit in self.units()], dtype=torch.float64)
        return self._found(curves.reshape(len(self.windows), -1, curves.shape[-1]).mean(dim=0))


def make_work(
    reader: Reader, ids: torch.Tensor, terms: Terms, heads: Mapping[int, int], compactor: Compactor | None
) -> Work:
    """Return the work of the calibration method that ``terms.method`` names.

    Raises:
        SettingsRefused: the method measures a compactor, and the policy has none that can be measured. A compactor
            cannot be measured if it needs the attention that slots received so far, because a window records none.

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
