"""Cap the KV-cache memory of a Hugging Face model at a number of bytes, and compact it during generation.

:func:`capped` is a context manager: inside its block, ``model.generate`` runs under the cap. :func:`wrap` returns a
model whose ``generate`` always runs under the cap. :func:`plan` returns, without running the model, how many slots fit
under a cap, and how many bytes the slots and each kind of temporary data take. :class:`Runtime` serves many
conversations under one cap.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
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
    from agentmem.sessions import CompactionContext, Message, Reply, Runtime, Session, SessionSettings
    from agentmem.settings import Settings

__version__ = version("agentmem-runtime")

_MODULES = {
    "agentmem.api": "CappedModel capped plan wrap",
    "agentmem.contracts": "Budgets Compaction Compactor HeadCompaction Policy Queries Rewrite Segment",
    "agentmem.errors": (
        "AgentmemError CapBypassed CapTooSmall CompactionFailed CopyRefused MemoryCapExceeded MemoryClosed "
        "MemoryUnused ModelUnavailable PolicyContractBroken PromptMismatch RuntimeBusy SettingsRefused "
        "SnapshotRefused TurnEnded UnknownPolicy UnsupportedGeneration UnsupportedModel"
    ),
    "agentmem.hf": "CappedCache",
    "agentmem.memory.memory": "Usage",
    "agentmem.planning.pricing": "Plan",
    "agentmem.reporting.report": "CompactionReport LayerReport RebaseReport RunReport SummaryReport",
    "agentmem.sessions": "CompactionContext Message Reply Runtime Session SessionSettings",
    "agentmem.settings": "Settings",
}
"""The modules that define the public names; each is imported when one of its names is first used.

Importing torch and transformers takes seconds, which a command line that prints its version need not spend.
"""
_PLACES = {name: module for module, names in _MODULES.items() for name in names.split()}

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
    "SessionSettings",
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

if not TYPE_CHECKING:  # a type checker would take any name for one of this module's

    def __getattr__(name: str) -> object:
        """Import a public name, or one of the modules that define them, when it is first used."""
        if name in _PLACES:
            found = getattr(import_module(_PLACES[name]), name)
            globals()[name] = found
            return found
        if any(f"{module}.".startswith(f"agentmem.{name}.") for module in _MODULES):
            return import_module(f"agentmem.{name}")
        raise AttributeError(f"module 'agentmem' has no attribute {name!r}")


def __dir__() -> list[str]:
    """Return the public names."""
    return __all__
