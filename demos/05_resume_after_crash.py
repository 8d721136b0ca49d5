"""Kill a process in the middle of a save, and go on from what it had saved before, token for token.

    python demos/05_resume_after_crash.py [--model NAME_OR_PATH] [--cap 7MiB] [--tokens 100]

A child process talks and saves after every reply. It is killed (SIGKILL, no clean-up) when its second save is half
done. Look at what it leaves behind, and at the last line: the session that was resumed from its first save goes on with
the same tokens as one that was never saved, killed or loaded.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

import agentmem
from agentmem import models
from support.refusals import positive, run

QUESTIONS = ("Tell me how a tower clock works.", "Why does each part matter?", "Which part wears out first?")


def talk(session: agentmem.Session, tokens: int, turn: int) -> list[int]:
    """One question of the conversation and its greedy reply, which is always so long."""
    session.append("user", QUESTIONS[turn % len(QUESTIONS)])
    return session.generate(max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False).ids


def child(given: argparse.Namespace) -> None:
    """Talk and save, until somebody kills this process in the middle of its second save."""
    torch.set_num_threads(given.threads)  # memory is planned by them, and tokens are going to be compared
    session = runtime_of(given).session()
    for turn in range(2):
        talk(session, given.tokens, turn)
        session.save(given.child)
        print(f"child: {turn + 1} turn(s) saved, {session.stats.compactions} compaction(s) so far", flush=True)
        os.fsync = lambda _: time.sleep(3600)  # a disk that stands still, so that the next save has a middle


def runtime_of(given: argparse.Namespace) -> agentmem.Runtime:
    """The same in both processes."""
    model, tokenizer = models.load(given.model)
    return agentmem.Runtime(model, tokenizer, cap=given.cap, policy=given.policy, keep_recent=32)


def crash(folder: Path) -> None:
    """Start the child; kill it as soon as its second save has begun."""
    command = [sys.executable, __file__, *sys.argv[1:], "--child", str(folder), f"--threads={torch.get_num_threads()}"]
    with subprocess.Popen(command) as process:
        while process.poll() is None and not (folder / "manifest.json").exists():
            time.sleep(0.01)
        first, begun = {file.name for file in folder.iterdir()}, set[str]()
        while process.poll() is None and not begun:
            begun = {file.name for file in folder.iterdir()} - first
        process.kill()
    if not first:
        raise SystemExit("the child ended before it had saved anything; what it printed says why")
    left = [f"{name[:20]}..., {(folder / name).stat().st_size} bytes" for name in begun if (folder / name).exists()]
    print(f"child: killed (exit code {process.returncode}); left by its second save: {'; '.join(left) or 'nothing'}")


def resume(given: argparse.Namespace) -> None:
    """Crash, resume, compare."""
    with tempfile.TemporaryDirectory() as folder:
        crash(Path(folder))
        runtime = runtime_of(given)
        with runtime.load(folder) as resumed:
            turns, stats = sum(entry.kind == "reply" for entry in resumed.entries), resumed.stats
            print(f"resumed: {turns} turn(s), {stats.tokens} tokens, {stats.compactions} compaction(s)")
            tokens = talk(resumed, given.tokens, turns)
            print(f"   ... {resumed.transcript.text[-80:]!r}")
    with runtime, runtime.session() as never_killed:
        expected = [talk(never_killed, given.tokens, turn) for turn in range(turns + 1)][-1]
    same = sum(one == other for one, other in zip(tokens, expected, strict=True))
    print(f"{same} of the next {len(expected)} tokens are those of a session that was never killed")


def main() -> None:
    """Be the parent, or the child that it starts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a Hugging Face id or path; default: the embedded model")
    parser.add_argument("--cap", default="7MiB")
    parser.add_argument("--policy", default="am-halving")
    parser.add_argument("--tokens", type=positive, default=100, help="of every reply")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--threads", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    (child if given.child else resume)(given)


if __name__ == "__main__":
    run(main)
