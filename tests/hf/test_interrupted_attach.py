"""An interrupt at any line that attaches or detaches: the model is clean, or the next block makes it clean."""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

import torch

import agentmem
from agentmem.testing import tiny_model
from benchmarks.interrupts import exits
from support import variants

FILES = ("hf/attach.py", "hf/forward_context.py")
SKIPPED = ("scope", "own_frame", "_split", "_enter", "_leave", "generate", "_register", "__new__")
"""Functions in the files that do not attach or detach."""


class Interrupter:
    """Raise KeyboardInterrupt at the ``at``-th line of what attaches and detaches."""

    def __init__(self, at: int) -> None:
        self.left, self.where = at, ""

    def enter(self, frame: FrameType, _event: str, _: Any) -> Any:
        """Trace the functions of the files."""
        code = frame.f_code
        return self.line if code.co_filename.endswith(FILES) and code.co_name not in SKIPPED else None

    def line(self, frame: FrameType, event: str, _: Any) -> Any:
        """Count a line."""
        if event == "line" and not self.where and frame.f_lasti not in exits(frame.f_code):
            self.left -= 1
            if self.left == 0:
                self.where = f"{frame.f_code.co_name}:{frame.f_lineno}"
                raise KeyboardInterrupt
        return self.line


def interrupted(model: Any, at: int) -> str:
    """Open and close a block of the model with an interrupt at the ``at``-th line; return the line's place."""
    interrupter, before = Interrupter(at), sys.gettrace()
    try:
        sys.settrace(interrupter.enter)
        with agentmem.capped(model, **variants.ROOMY) as memory:
            sys.settrace(None)
            model.generate(variants.prompt(6), past_key_values=memory, max_new_tokens=1)
            sys.settrace(interrupter.enter)
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(before)
    return interrupter.where


def changes(model: Any) -> list[str]:
    """What is ours on a model."""
    found = [f"config {model.config._attn_implementation}"] if model.config._attn_implementation != "sdpa" else []
    found += [name for name in ("generate", "__reduce_ex__") if name in vars(model) or name in vars(model.model)]
    for module in (model, model.model):
        found += [name for name, each in vars(module).items() if name.startswith("_forward_") and each]
    return found


def test_an_interrupt_while_attaching_or_detaching_leaves_a_usable_model() -> None:
    """The next block has stock's tokens, and after it nothing of ours is on the model; sampled at every second line."""
    ids, model, places, uncounted = variants.prompt(12), tiny_model("llama"), list[str](), 0
    options: dict[str, Any] = {"max_new_tokens": 2, "do_sample": False}
    stock = model.generate(ids, **options)
    while where := interrupted(model, 2 * len(places) + 2):
        places.append(where)
        if not where.startswith("detach:"):  # its first lines: the model has not been given up yet
            assert changes(model) == [], where
        with agentmem.capped(model, **variants.ROOMY) as memory:
            assert torch.equal(model.generate(ids, past_key_values=memory, **options), stock), where
        if changes(model):
            assert where.startswith("detach:"), where
            uncounted, model = uncounted + 1, tiny_model("llama")
    assert len(places) > 50
    assert uncounted <= 1  # the very first line of detach: as if nobody had called it
    assert changes(model) == []
