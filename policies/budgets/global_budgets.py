"""Global budgets: keep the slots with the highest scores among all heads and layers.

Source: Ada-KV, arXiv:2407.11550, which compares scores within a layer; here they are compared over all layers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from agentmem.contracts import BudgetRequest, Budgets
from agentmem.policies.budgets.water_filling import Demand, allocate


@dataclass(frozen=True)
class Global(Budgets):
    """Gives a head one slot for each of its scores that is among the highest of all heads, and at least the floor.

    Scores are compared as the compactor's survey returns them. Of heads with equal scores, the earlier head gets the
    slot.
    """

    floor: float = 0.5
    """Number of slots that every head gets at least, as a fraction of an equal share."""
    head_ceiling: float = 4.0
    layer_ceiling: float = 2.0
    needs_survey = True

    def __post_init__(self) -> None:
        """Refuse settings that cannot work."""
        if not 0 <= self.floor <= 1:
            raise ValueError(f"floor: {self.floor!r} is no fraction of an equal share; give 0 to 1")
        for name in ("head_ceiling", "layer_ceiling"):
            if not 1 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name}: {getattr(self, name)!r} equal shares cannot be allocated; give 1 or more")

    def allocate(self, request: BudgetRequest) -> tuple[tuple[int, ...], ...]:
        """Lower a common score threshold until the scores at or above it use up all slots."""
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
