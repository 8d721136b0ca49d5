"""Connect memories to Hugging Face models.

Only this folder uses the internals of transformers' caches, attention, masks and hooks.

A model is *attached* while at least one capped block (``with agentmem.capped(model, …)``) is open for it. Its config
then names agentmem's attention implementation, hooks run around its forwards, and its ``generate`` checks the arguments
first. Only this model instance is changed, and the end of its last block undoes the changes. Forwards that use no
memory still call the original functions.
"""

from agentmem.hf.attach import attach, detach, detach_later, scope
from agentmem.hf.cache import CappedCache
from agentmem.hf.fingerprint import fingerprint
from agentmem.hf.generate_checks import returned
from agentmem.hf.model_identity import model_identity, weights, weights_sample
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
    "weights_sample",
]
