"""Global budgets: keep the slots with the highest scores among the slots of all heads and layers.

Source: Ada-KV, arXiv:2407.11550, which compares scores within a layer; here scores are compared over all layers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from agentmem.contracts import BudgetRequest, Budgets
from agentmem.policies.budgets.water_filling import Demand, allocate


@dataclass(frozen=True)
class Global(Budgets):
    """Gives each head as many slots as it has scores among the highest scores of all heads.

    Each head gets at least the minimum that ``floor`` sets. :meth:`Compactor.survey` returns one score per slot; the
    scores of all heads are compared without any scaling. If heads have equal scores, the earlier head gets the slot.
    """

    floor: float = 0.5
    """Fewest slots of a head, as a fraction of an equal share (the slots of a head if all heads get equally many)."""
    head_ceiling: float = 4.0
    layer_ceiling: float = 2.0
    needs_survey = True

    def __post_init__(self) -> None:
        """Raise ValueError if a setting is unknown or out of range."""
        if not 0 <= self.floor <= 1:
            raise ValueError(f"floor: {self.floor!r} is no fraction of an equal share; give 0 to 1")
        for name in ("head_ceiling", "layer_ceiling"):
            if not 1 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name}: {getattr(self, name)!r} equal shares cannot be allocated; give 1 or more")

    def allocate(self, request: BudgetRequest) -> tuple[tuple[int, ...], ...]:
        """Allocate to each head one slot for each of its scores that is at or above a threshold.

        The threshold is the same for all heads; it falls until all slots are allocated.
        """
        if len(request.surveys) != len(request.held):
            raise ValueError(
                f"{len(request.surveys)} surveys for {len(request.held)} layers: global budgets compare the scores of "
                "all layers; allocate them in a memory, which surveys every layer first"
            )
        return allocate(
            request, [[_scored(scores) for scores in survey.scores] for survey in request.surveys], self.floor
        )


def _scored(scores: torch.Tensor) -> Demand:
    return lambda threshold: int((scores >= threshold).sum())
