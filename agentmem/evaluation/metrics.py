"""How far one stream of next-token distributions is from another, position by position, in float64."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from agentmem.contracts import blocks
from agentmem.errors import AgentmemError

_BLOCK = 64
"""Positions at a time: two float64 blocks of [64, vocabulary] are all that is alive."""


@dataclass
class Divergence:
    """Per-position measures of ``capped`` against ``full``, appended piece by piece.

    ``kl`` is KL(full ‖ capped) in nats; ``nll`` is the capped model's negative log-likelihood of the true next token
    and ``delta_nll`` that minus the full model's, in nats; ``agrees`` says whether both have the same most likely
    token; ``compactions`` counts those that had happened when the position was read.
    """

    kl: list[float] = field(default_factory=list)
    nll: list[float] = field(default_factory=list)
    delta_nll: list[float] = field(default_factory=list)
    agrees: list[bool] = field(default_factory=list)
    compactions: list[int] = field(default_factory=list)

    def add(self, full: torch.Tensor, capped: torch.Tensor, targets: torch.Tensor, compactions: int) -> None:
        """Compare logits ``full [c, V]`` and ``capped [c, V]`` of consecutive positions; ``targets [c]`` come next.

        Raises:
            AgentmemError: a logit is not finite; names the position.

        """
        for part in blocks(len(targets), _BLOCK):
            self._add(full[part].to(capped.device), capped[part], targets[part].to(capped.device))
        self.compactions += [compactions] * len(targets)

    def _add(self, full: torch.Tensor, capped: torch.Tensor, targets: torch.Tensor) -> None:
        expected = torch.log_softmax(full.double(), dim=-1)
        found = torch.log_softmax(capped.double(), dim=-1)
        gap = expected - found
        # Every distribution sums to 1, so KL = Σ p·gap exactly; float64 keeps it to about 1e-15 of the logits' range.
        kl = (expected.exp() * gap).sum(dim=-1)
        self._require_finite(kl)
        self.kl += kl.tolist()
        self.nll += (-found.gather(1, targets.unsqueeze(1))).squeeze(1).tolist()
        self.delta_nll += gap.gather(1, targets.unsqueeze(1)).squeeze(1).tolist()
        self.agrees += (full.argmax(dim=-1) == capped.argmax(dim=-1)).tolist()

    def _require_finite(self, kl: torch.Tensor) -> None:
        if not bool(torch.isfinite(kl).all()):
            position = len(self.kl) + int(torch.isfinite(kl).logical_not().nonzero()[0])
            raise AgentmemError(
                f"evaluation: a logit at position {position} is not finite, so nothing can be compared from there; "
                "try --dtype float32, or a policy that the model bears"
            )
