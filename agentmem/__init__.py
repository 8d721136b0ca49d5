"""A hard cap in bytes on the KV memory of a Hugging Face model, compacted in mid-thought.

Two entry points to the same machinery: :func:`capped`, a context manager around unmodified code, and :func:`wrap`, an object
with ``generate``. :func:`plan` says beforehand what a cap comes to. :class:`Runtime` keeps whole conversations.
"""

from __future__ import annotations

from importlib.metadata import version

from agentmem.api import CappedModel, CappedOutput, capped, plan, wrap
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
    "CappedOutput",
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
