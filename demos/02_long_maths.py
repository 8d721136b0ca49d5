"""Think longer than the memory: halve it whenever it is full, a few times at most, then answer.

    python demos/02_long_maths.py [--model NAME_OR_PATH] [--cap 8MiB] [--compactions 2] [--problems 3] [--file JSONL]

The loop that the paper runs on AIME (arXiv:2602.16284): the memory has a physical size; when it is full it is compacted
to half; after N compactions the next time it is full is the end of thinking, and the answer is forced. Look at each
line's "thought": more tokens than the memory has slots. The default model cannot do maths; a better one sometimes can.
"""

from __future__ import annotations

import argparse
from contextlib import closing

import agentmem
from agentmem import models
from agentmem.sessions import CompactionFinished, TokenEvent
from agentmem.settings import format_bytes
from support.problems import Problem, extract, generated, read, same
from support.refusals import count, file_for, positive, run

ANSWER_TOKENS = 16


def options() -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a Hugging Face id or path; default: the embedded model")
    parser.add_argument("--cap", default="8MiB")
    parser.add_argument("--policy", default="am-halving")
    parser.add_argument("--compactions", type=count, default=2, help="of one problem, at most")
    parser.add_argument("--problems", type=positive, default=3, help="how many")
    parser.add_argument(
        "--file", type=file_for(read), help='JSON lines with "problem" and "answer"; default: problems are made up'
    )
    parser.add_argument("--tokens", type=positive, default=32768, help="of thinking about one problem, at most")
    return parser.parse_args()


def last_words(session: agentmem.Session) -> str:
    """The paper's words that end the thinking and begin the answer."""
    end = "</think>\n" if "</think>" in session.tokenizer.get_vocab() else ""
    return f"\n\nI need to respond with the answer.\n{end}\nFinal Answer:"


def think(session: agentmem.Session, most: int, tokens: int) -> int:
    """Think until the model ends by itself or the memory is full for the last time; how many tokens it thought."""
    compactions, thought = session.stats.compactions, 0
    needed = len(session.tokenizer(last_words(session))["input_ids"]) + ANSWER_TOKENS + 2
    with closing(session.stream(max_new_tokens=tokens, do_sample=False, keep_open=True)) as events:
        for event in events:
            compactions += isinstance(event, CompactionFinished)
            thought += isinstance(event, TokenEvent)
            if compactions >= most and isinstance(event, TokenEvent) and session.stats.room <= needed:
                break  # the memory will not be compacted again: what room is left is for the answer
    return thought


def solve(runtime: agentmem.Runtime, problem: Problem, given: argparse.Namespace) -> bool:
    """Ask one problem in a session of its own; say what happened, and whether the answer is right."""
    with runtime.session() as session:
        session.append("user", f"{problem.question}\nThink step by step. Put the final answer into \\boxed{{}}.")
        thought = think(session, given.compactions, given.tokens)
        reply = session.reply
        assert reply is not None  # noqa: S101  # it was left open
        forced = reply.end is None
        if forced:
            session.say(last_words(session))
            session.generate(max_new_tokens=ANSWER_TOKENS, do_sample=False, keep_open=True)
        answer = extract(reply.text)
        right, stats = same(answer, problem.answer), session.stats
    print(f"\n{problem.question}")
    print(f"  thought {thought} tokens in {stats.capacity} slots, {stats.compactions} compaction(s)", end=", ")
    print(f"{'forced to answer' if forced else 'ended by itself'}; peak {format_bytes(stats.peak_bytes)}")
    print(f"  ... {' '.join(reply.text.split())[-100:]}")
    print(f"  answer {answer}, {'right' if right else f'wrong: it is {problem.answer}'}")
    return right


def main() -> None:
    """Solve the problems one by one."""
    given = options()
    problems = (given.file or generated(given.problems))[: given.problems]
    model, tokenizer = models.load(given.model)
    with agentmem.Runtime(model, tokenizer, cap=given.cap, policy=given.policy, keep_recent=32) as runtime:
        right = sum(solve(runtime, problem, given) for problem in problems)
    print(f"\n{right} of {len(problems)} right, at most {given.compactions} compaction(s) each, cap {given.cap}")


if __name__ == "__main__":
    run(main)
