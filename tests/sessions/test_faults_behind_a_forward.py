"""Faults and interrupts behind a forward, and at lines where something is changed, leave a session that goes on."""

from __future__ import annotations

import copy
import linecache
import sys
from types import FrameType
from typing import Any

import pytest

from support import tiny_chat as tc


@pytest.mark.parametrize("error", [MemoryError("logits"), KeyboardInterrupt()])
@pytest.mark.parametrize("step", [1, 5])
def test_a_fault_in_the_head_leaves_something_to_read(error: BaseException, step: int) -> None:
    """What the lm_head raises loses the logits; the ids that they came from are read again."""
    model, left = copy.deepcopy(tc.model("llama", 2)), [step]
    with tc.runtime(1, on=model) as runtime:
        session = runtime.session()
        session.read(tc.ids(40))

        def hook(*_: object) -> None:
            left[0] -= 1
            if left[0] == 0:
                raise error

        handle = model.lm_head.register_forward_hook(hook)
        with pytest.raises(type(error)):
            session.generate(max_new_tokens=20, do_sample=False, keep_open=True)
        handle.remove()
        assert session.pending
        session.generate(max_new_tokens=4, do_sample=False)
        tc.audit(runtime)


LINES = (
    ("hf/forwards.py", "packed", "logits: torch.Tensor"),
    ("engine/feeding.py", "_begun", "append.columns ="),
    ("engine/feeding.py", "_run", "part.want.outcome = Outcome(part.tokens"),
    ("engine/scheduler.py", "submit", "self._arrived"),
    ("engine/scheduler.py", "_ended", "self._waiting ="),
    ("engine/scheduler.py", "_ended", "self._expected ="),
    ("memory/forwards.py", "commit", "for sequence, each in zip"),
    ("memory/forwards.py", "commit", "memory.progress.consumed ="),
    ("compaction/run.py", "_finish", "self.sequence.change"),
    ("ledger.py", "hold", "self._held["),
    ("memory/store.py", "_release", "self.ledger.release"),
    ("runtime.py", "end", "session.turn = None"),
    ("runtime.py", "try_admit", "admitted = lend"),
    ("sessions/turn_steps.py", "close", "with scheduler.lock"),
)


@pytest.mark.parametrize(("file", "function", "text"), LINES)
def test_an_interrupt_at_a_line_leaves_a_session_that_goes_on(file: str, function: str, text: str) -> None:
    """Afterwards replies, messages and compactions work and the account is what is allocated."""
    hit = [False]

    def local(frame: FrameType, event: str, _: object) -> Any:
        line = linecache.getline(frame.f_code.co_filename, frame.f_lineno)
        if event == "line" and not hit[0] and text in line:
            hit[0] = True
            raise KeyboardInterrupt
        return local

    def entered(frame: FrameType, _: str, __: object) -> Any:
        code = frame.f_code
        return local if code.co_name == function and code.co_filename.endswith(file) else None

    with tc.runtime(1, "heavy-hitters") as runtime:
        session = tc.filled(runtime, 60)
        before = sys.gettrace()
        sys.settrace(entered)
        try:
            with pytest.raises(KeyboardInterrupt):
                session.generate(max_new_tokens=12, do_sample=False, keep_open=True)
        finally:
            sys.settrace(before)
        assert hit == [True]
        session.generate(max_new_tokens=12, do_sample=False, keep_open=True)
        session.append("user", "hello again")
        session.generate(max_new_tokens=12, do_sample=False)
        session.compact()
        assert [*session.memory.sequences[0].ids, *session.pending] == list(session.ids)
        tc.audit(runtime)
