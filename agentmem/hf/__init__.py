"""The only folder that names transformers' cache, attention, mask and hook internals.

A model is *attached* while at least one capped block uses it: its attention implementation is renamed on its config,
its forward is watched by hooks, and ``generate`` checks its arguments first. All of it is per instance, counted, and
undone with the last block. Forwards that are not ours reach the original functions.
"""

from agentmem.hf.attach import attach, detach, detach_later, scope
from agentmem.hf.cache import CappedCache
from agentmem.hf.fingerprint import fingerprint
from agentmem.hf.generate_checks import returned
from agentmem.hf.model_identity import model_identity, weights
from agentmem.hf.rope import positions
from agentmem.hf.self_check import Check, CheckReport, check, check_packing, packs, require_checked, require_turning
from agentmem.hf.support import (
    COVERED,
    check_tokenizer,
    check_tool,
    describe,
    end_ids,
    input_device,
    refuse_probe,
    refuse_scratch,
    text_model,
)

__all__ = [
    "COVERED",
    "CappedCache",
    "Check",
    "CheckReport",
    "attach",
    "check",
    "check_packing",
    "check_tokenizer",
    "check_tool",
    "describe",
    "detach",
    "detach_later",
    "end_ids",
    "fingerprint",
    "input_device",
    "model_identity",
    "packs",
    "positions",
    "refuse_probe",
    "refuse_scratch",
    "require_checked",
    "require_turning",
    "returned",
    "scope",
    "text_model",
    "weights",
]
