"""Compare the next-token distributions of capped and full memory at every position of a text, in float64."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from agentmem.contracts import blocks
from agentmem.errors import AgentmemError

_BLOCK = 64
"""The number of positions compared at a time; it limits the float64 tensors to ``[64, vocabulary]`` each."""


@dataclass
class Divergence:
    """The measures that compare capped with full memory: lists with one entry per position.

    Call :meth:`add` with the logits of successive pieces of a text; each call appends to the lists.
    """

    kl: list[float] = field(default_factory=list)
    """KL(full ‖ capped) in nats."""
    nll: list[float] = field(default_factory=list)
    """Negative log-likelihood of the true next token with capped memory, in nats."""
    delta_nll: list[float] = field(default_factory=list)
    """``nll`` minus the negative log-likelihood with full memory, in nats."""
    agrees: list[bool] = field(default_factory=list)
    """True if capped and full memory have the same most likely next token."""
    compactions: list[int] = field(default_factory=list)
    """Compactions that had happened when the position was read."""

    def add(self, full: torch.Tensor, capped: torch.Tensor, targets: torch.Tensor, compactions: int) -> None:
        """Append the measures of the next ``c`` positions, computed from ``full [c, V]`` and ``capped [c, V]`` logits.

        ``targets [c]`` are the true next tokens; ``compactions`` is the number of compactions before these positions.

        Raises:
            AgentmemError: a logit is not finite; the message names the position.

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
