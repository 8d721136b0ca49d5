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
    """Base of the calibration methods, which measure on a text how many slots each KV head needs.

    The work is divided into named units: one window (piece of the text), or one head in one window. The units are
    measured one by one. The result of a unit can be stored as JSON.
    """

    def __init__(self, reader: Reader, ids: torch.Tensor, terms: Terms, heads: Mapping[int, int]) -> None:
        """Cut the text ``ids [n]`` into windows (pieces of ``terms.window`` tokens).

        ``heads`` maps every compacted layer to the number of its KV heads.
        """
        self.reader, self.terms, self.heads = reader, terms, heads
        self.windows = cut(ids, terms)
        self._open: tuple[int, Window] | None = None

    def window(self, index: int) -> Window:
        """Return the window (piece of the text) with number ``index``.

        Only one window is kept in memory. When another window is asked for, the previous one is freed.
        """
        if self._open is None or self._open[0] != index:
            self._open = None  # freed before the next window is read
            self._open = (index, Window(self.reader, self.windows[index], self.terms))
        return self._open[1]

    def units(self) -> list[str]:
        """Return the name of every unit of work, in order; here a unit is one window of the text."""
        return [str(window) for window in range(len(self.windows))]

    @abstractmethod
    def measure(self, unit: str) -> Any:
        """Measure the unit of work that is named ``unit``, and return its result as JSON values."""

    @abstractmethod
    def found(self, done: Mapping[str, Any]) -> Found:
        """Compute the outcome of the calibration from ``done``, which maps the name of every unit to its result."""


class Attention(Work):
    """Compute each head's share (part of the slots that the head gets) from attention scores.

    The text is cut into windows. The shares are computed in each window separately and then averaged.
    """

    def measure(self, unit: str) -> list[float]:
        """Return the share of every head, computed from one window of the text; ``unit`` is the window's number.

        A share is the head's number of slots, divided by the mean number per head.
        """
        return window_shares(self.window(int(unit)), list(self.heads))

    def found(self, done: Mapping[str, Any]) -> Found:
        """Return each head's share, as the mean over all windows of the text.

        A share is the head's number of slots, divided by the mean number per head. The result has no ``errors``.
        """
        return Found(_mean([done[unit] for unit in self.units()]).tolist())


class Curved(Work):
    """Base of the methods that find a curve (error at each kept fraction of slots) for every head.

    Each head's share (part of the slots that the head gets) is computed from the curves. The computed shares make the
    sum of all heads' errors smallest.
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
    """Estimate the curves (error at each kept fraction of slots) of all heads at once by Fisher information.

    The text is cut into windows. The curves are estimated in each window separately and then averaged.
    """

    def measure(self, unit: str) -> list[list[float]]:
        """Return one list per head: the head's error at each kept fraction of slots in ``terms.fractions``.

        An error is the estimated KL divergence, in nats per token, that compacting this head alone causes in the
        model's predictions. ``unit`` is the number of the window (piece of the text) that is measured.
        """
        return window_curves(self.window(int(unit)), list(self.heads), self.compactor)

    def found(self, done: Mapping[str, Any]) -> Found:
        """Return each head's mean curve over all windows of the text, and each head's share of the slots.

        A curve is a head's error at each kept fraction of slots. The shares are computed from all curves. A share is
        the head's number of slots, divided by the mean number per head.
        """
        return self._found(_mean([done[unit] for unit in self.units()]))


class Loss(Curved):
    """Measure the curve (error at each kept fraction of slots) of one head at a time, in each window of the text."""

    def units(self) -> list[str]:
        """Return a name ``window.layer.head`` for every head of every layer in every window."""
        heads = [(layer, head) for layer, count in self.heads.items() for head in range(count)]
        return [f"{window}.{layer}.{head}" for window in range(len(self.windows)) for layer, head in heads]

    def measure(self, unit: str) -> list[float]:
        """Return one head's error at each kept fraction of slots in ``terms.fractions``.

        An error is the KL divergence, in nats per token, that compacting this head alone causes in the model's
        predictions. ``unit`` is ``window.layer.head``: the numbers of a window (piece of the text), a layer and a head.
        """
        window, layer, head = map(int, unit.split("."))
        return head_curve(self.window(window), layer, head, self.compactor)

    def found(self, done: Mapping[str, Any]) -> Found:
        """Return each head's mean curve over all windows of the text, and each head's share of the slots.

        A curve is a head's error at each kept fraction of slots. The shares are computed from all curves. A share is
        the head's number of slots, divided by the mean number per head.
        """
        curves = torch.tensor([done[unit] for unit in self.units()], dtype=torch.float64)
        return self._found(curves.reshape(len(self.windows), -1, curves.shape[-1]).mean(dim=0))


def make_work(
    reader: Reader, ids: torch.Tensor, terms: Terms, heads: Mapping[int, int], compactor: Compactor | None
) -> Work:
    """Return an object that carries out the calibration method ``terms.method`` on the text ``ids``.

    ``heads`` maps every compacted layer to the number of its KV heads. ``compactor`` is that of the policy
    ``terms.policy``; the method ``attention`` does not need it.

    Raises:
        SettingsRefused: the method measures a compactor, and the policy has none that can be measured. A compactor
            cannot be measured if it needs the attention that slots received so far, because a calibration does not
            record this attention.

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
