"""Cap the KV-cache memory of a Hugging Face model at a number of bytes, and compact it during generation.

:func:`capped` is a context manager: inside its block, ``model.generate`` runs under the cap. :func:`wrap` returns a
model whose ``generate`` always runs under the cap. :func:`plan` returns, without running the model, how many slots fit
under a cap and how many bytes each use takes. :class:`Runtime` serves many conversations under one cap.
"""

from __future__ import annotations

from importlib.metadata import version

from agentmem.api import CappedModel, capped, plan, wrap
from agentmem.contracts import Budgets, Compaction, Compactor, HeadCompaction, Policy, Queries, Rewrite, Segment
from agentmem.errors import (
    AgentmemError,
    CapBypassed,
    CapTooSmall,
    CompactionFailed,
    CopyRefused,
    MemoryCapExceeded,
    MemoryClosed,
    MemoryUnused,
    ModelUnavailable,
    PolicyContractBroken,
    PromptMismatch,
    RuntimeBusy,
    SettingsRefused,
    SnapshotRefused,
    TurnEnded,
    UnknownPolicy,
    UnsupportedGeneration,
    UnsupportedModel,
)
from agentmem.hf import CappedCache
from agentmem.memory.memory import Usage
from agentmem.planning.pricing import Plan
from agentmem.reporting.report import CompactionReport, LayerReport, RebaseReport, RunReport, SummaryReport
from agentmem.sessions import CompactionContext, Message, Reply, Runtime, Session
from agentmem.settings import Settings

__version__ = version("agentmem-runtime")

__all__ = [
    "AgentmemError",
    "Budgets",
    "CapBypassed",
    "CapTooSmall",
    "CappedCache",
    "CappedModel",
    "Compaction",
    "CompactionContext",
    "CompactionFailed",
    "CompactionReport",
    "Compactor",
    "CopyRefused",
    "HeadCompaction",
    "LayerReport",
    "MemoryCapExceeded",
    "MemoryClosed",
    "MemoryUnused",
    "Message",
    "ModelUnavailable",
    "Plan",
    "Policy",
    "PolicyContractBroken",
    "PromptMismatch",
    "Queries",
    "RebaseReport",
    "Reply",
    "Rewrite",
    "RunReport",
    "Runtime",
    "RuntimeBusy",
    "Segment",
    "Session",
    "Settings",
    "SettingsRefused",
    "SnapshotRefused",
    "SummaryReport",
    "TurnEnded",
    "UnknownPolicy",
    "UnsupportedGeneration",
    "UnsupportedModel",
    "Usage",
    "__version__",
    "capped",
    "plan",
    "wrap",
]
