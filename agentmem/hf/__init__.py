"""Connect memories to Hugging Face models.

No other folder uses the internals of transformers' caches, attention, masks and hooks.

A model is *attached* while at least one capped block uses it: its config names agentmem's attention implementation,
hooks watch its forwards, and ``generate`` checks its arguments first. These changes concern the one model instance, and
the end of its last block undoes them. Forwards that use no memory reach the original functions.
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
