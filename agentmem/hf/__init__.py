"""The only folder that names transformers' cache, attention, mask and hook internals.

A model is *attached* while at least one capped block uses it: its attention implementation is renamed on its config,
its forward is watched by hooks, and ``generate`` checks its arguments first. All of it is per instance, counted, and
undone with the last block. Forwards that are not ours reach the original functions.
"""

from agentmem.hf.attach import attach, detach, scope
from agentmem.hf.cache import CappedCache
from agentmem.hf.fingerprint import fingerprint
from agentmem.hf.support import (
    FAMILIES,
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
    "FAMILIES",
    "CappedCache",
    "attach",
    "check_tokenizer",
    "check_tool",
    "describe",
    "detach",
    "end_ids",
    "fingerprint",
    "input_device",
    "refuse_probe",
    "refuse_scratch",
    "scope",
    "text_model",
]
