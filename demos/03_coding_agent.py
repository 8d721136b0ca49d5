"""An agent that writes code, has it tested in a sandbox, and repairs it, inside one memory under a cap.

    python demos/03_coding_agent.py [--model NAME_OR_PATH] [--cap 16MiB] [--tasks 2] [--file TASKS] [--inject EVIL ...]

Look at how the code is tested (in a process without network, with limits of time and memory) and at what its output
costs: it is compacted as soon as it was read, with the task in focus. ``--inject`` puts code into the model's mouth
that a sandbox is for; the agent goes on. The default model rarely passes a test; a better one does.
"""

from __future__ import annotations

import argparse
from itertools import zip_longest

import agentmem
from agentmem import models
from agentmem.errors import SettingsRefused
from agentmem.settings import format_bytes
from support import sandbox
from support.coding_tasks import TASKS, Task, code_in, read_tasks
from support.refusals import count, file_for, positive, run

EVIL = {
    "loop": "while True: pass",
    "memory": "hoard = bytearray(10_000_000_000)",
    "write": "open('../agentmem-demo-was-here', 'w').write('!')",
    "socket": "import socket\nsocket.create_connection(('127.0.0.1', 9))",
}


def options() -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a Hugging Face id or path; default: the embedded model")
    parser.add_argument("--cap", default="16MiB")
    parser.add_argument("--policy", default="am-halving")
    parser.add_argument("--tasks", type=positive, default=2, help="how many")
    parser.add_argument("--file", type=file_for(read_tasks), help="in HumanEval's form; default: a few of our own")
    parser.add_argument("--repairs", type=count, default=1, help="of one task, at most")
    parser.add_argument("--tokens", type=positive, default=160, help="of one reply, at most")
    parser.add_argument("--seconds", type=float, default=5, help="that the code may run")
    parser.add_argument("--inject", nargs="*", default=[], choices=EVIL, help="evil code to reply with, one a task")
    return parser.parse_args()


def reply_to(session: agentmem.Session, evil: str | None, tokens: int) -> str:
    """The model's reply, or the words that are put into its mouth."""
    if evil is None:
        return session.generate(max_new_tokens=tokens, do_sample=False).text
    session.say(code := f"```python\n{EVIL[evil]}\n```")
    return code


def show_output(session: agentmem.Session, task: Task, text: str) -> None:
    """Have the session read what the tests said, and compact it at once to a quarter."""
    focus = f"why {task.entry_point} fails" if session.memory.policy.queries.probing else ""
    said, before = f"The tests say:\n{text}\nRepair the code.", session.stats.tokens
    try:
        reports = session.append("tool", said, name="tests", compact="after", focus=focus)
    except SettingsRefused:  # a chat template without tools
        reports = session.append("user", said, compact="after", focus=focus)
    stats = session.stats
    print(f"    output of {stats.tokens - before} tokens read and compacted {len(reports)} time(s)", end="; ")
    print(f"room for {stats.room} more tokens")


def work_on(session: agentmem.Session, task: Task, evil: str | None, given: argparse.Namespace) -> bool:
    """Write, test, repair."""
    print(f"\n{task.name}")
    session.append("user", f"Complete this Python function. Reply with the code alone.\n\n{task.prompt}")
    for attempt in range(1 + given.repairs):
        text = reply_to(session, evil if attempt == 0 else None, given.tokens)
        code = code_in(text, entry_point=task.entry_point)
        code = code if evil and attempt == 0 else task.solution(code)
        outcome = sandbox.check(code, task.tests, entry_point=task.entry_point, seconds=given.seconds)
        last = outcome.text.strip().splitlines()[-1:] or ["passed"]
        print(f"  attempt {attempt + 1}: {outcome.status} after {outcome.seconds:.1f} s ({last[0][:80]})")
        if outcome.passed:
            return True
        show_output(session, task, outcome.text)
    return False


def main() -> None:
    """Work on the tasks one after the other, in one conversation."""
    given = options()
    tasks = (given.file or TASKS)[: max(given.tasks, len(given.inject))]
    model, tokenizer = models.load(given.model)
    with agentmem.Runtime(model, tokenizer, cap=given.cap, policy=given.policy, keep_recent=32) as runtime:
        session = runtime.session(name="coder")
        session.append("system", "You are a careful Python programmer.")
        passed = sum(work_on(session, *pair, given) for pair in zip_longest(tasks, given.inject[: len(tasks)]))
        stats = session.stats
    print(f"\n{passed} of {len(tasks)} tasks passed; {stats.tokens} tokens in {stats.capacity} slots", end=", ")
    print(f"{stats.compactions} compaction(s), peak {format_bytes(stats.peak_bytes)} of {given.cap}")


if __name__ == "__main__":
    run(main)
