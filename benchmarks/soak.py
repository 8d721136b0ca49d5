"""A session that goes on for hundreds of turns under one cap: tool outputs up to three times it, positions re-based.

    python -m benchmarks.soak --turns 200     # writes build/soak/report.json and build/soak/soak.png
    python -m benchmarks.soak --turns 6 --cap 12MiB --positions 1800     # positions end soon, so that some are re-based

After every forward the ledger is compared with the bytes that the storages really have. At the end: every turn was
answered, R + T stayed under the cap, and the process holds no more in its second half than in its first. Exit code 1
where one of these does not hold.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import psutil
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from agentmem import Runtime, models
from agentmem.evaluation.passage import default_text

if TYPE_CHECKING:
    from agentmem.memory.memory import Memory
    from agentmem.sessions import Session

FLAT = 1.02
"""Resident memory of the last quarter over that of the second, at most."""
LONG = 100
"""Turns from which on resident memory is judged: before, the process still warms up."""
ORDERS = ("Go on.", "What does the tool say?", "Name one thing from it.", "Summarise that in a sentence.")


@dataclass
class Soak:
    """What was seen, turn by turn."""

    cap_bytes: int
    capacity: int = 0
    positions: int = 0
    """Of the model; 0: its own, which a few turns do not use up."""
    turns: int = 0
    answered: int = 0
    tokens_seen: int = 0
    tool_tokens: int = 0
    longest_tool_tokens: int = 0
    compactions: int = 0
    rebases: int = 0
    median_rebase_kl: float = 0.0
    worst_rebase_kl: float = 0.0
    forwards_audited: int = 0
    peak_bytes: int = 0
    seconds: float = 0.0
    rss: list[int] = field(default_factory=list)
    held: list[int] = field(default_factory=list)

    @property
    def growth(self) -> float:
        """Median resident memory of the last quarter over that of the second: the first one warms up."""
        quarter = max(1, len(self.rss) // 4)
        return median(self.rss[-quarter:]) / median(self.rss[quarter : 2 * quarter] or self.rss)

    def faults(self) -> list[str]:
        """What does not hold."""
        found = []
        if self.answered < self.turns:
            found.append(f"{self.turns - self.answered} of {self.turns} turns were not answered")
        if self.peak_bytes > self.cap_bytes:
            found.append(f"R + T came to {self.peak_bytes} of {self.cap_bytes} bytes")
        if self.positions and not self.rebases:
            found.append(f"nothing was re-based, though there are {self.positions} positions only")
        if self.turns >= LONG and self.growth > FLAT:
            found.append(f"resident memory grew {self.growth:.3f} times")
        return found


def audit(memory: Memory, soak: Soak) -> None:
    """The ledger holds what the storages hold."""
    (row,) = memory.sequences
    stores = [store for store in row.stores if store is not None]
    held = sum(store.allocated_bytes for store in stores)
    ledger = memory.ledger
    if ledger.resident != held or ledger.resident + ledger.transient > ledger.cap:
        raise AssertionError(f"the ledger says {ledger.resident} bytes, the storages have {held}, cap {ledger.cap}")
    soak.forwards_audited += 1


def turn(session: Session, soak: Soak, text: str, rng: random.Random, words: int) -> None:
    """One turn: a tool's output, most often compacted after it was read, an order, a reply."""
    longest = 3 * soak.capacity
    tokens = rng.randint(longest // 8, longest)
    begin = rng.randrange(max(1, len(text) - 8 * tokens))
    ids = session.tokenizer(text[begin : begin + 8 * tokens], add_special_tokens=False)["input_ids"][:tokens]
    output = session.tokenizer.decode(ids)
    how: dict[str, Any] = {} if rng.random() < 1 / 4 else {"compact": "after", "target": 0.1}
    session.append("tool", output, **how)
    session.append("user", rng.choice(ORDERS))
    reply = session.generate(max_new_tokens=words, do_sample=False)
    soak.turns += 1
    soak.answered += bool(reply.ids)
    soak.tool_tokens += len(ids)
    soak.longest_tool_tokens = max(soak.longest_tool_tokens, len(ids))
    soak.rss.append(psutil.Process().memory_info().rss)
    soak.held.append(session.stats.total_slots)


def soaked(
    model: Any, tokenizer: Any, turns: int, *, cap: str, words: int, positions: int = 0, seed: int = 0, **settings: Any
) -> Soak:
    """Run so many turns; with ``positions``, of a model that has no more.

    Raises:
        AssertionError: the ledger and the storages disagree after some forward.

    """
    text, began = default_text() * 4, time.perf_counter()
    model.config.max_position_embeddings = positions or model.config.max_position_embeddings
    rng = random.Random(seed)  # noqa: S311  # texts, not secrets
    with Runtime(model, tokenizer, cap=cap) as runtime:
        session = runtime.session(rebase=True, keep_recent=48, **settings)
        soak = Soak(runtime.cap, session.stats.capacity, positions)
        session.memory.subscribe(lambda _: audit(session.memory, soak))
        session.append("system", "You read what tools say and answer in a few words.")
        for _ in range(turns):
            turn(session, soak, text, rng, words)
        report = session.memory.report()
    soak.tokens_seen = report.num_prompt_tokens + report.num_new_tokens
    soak.compactions, soak.rebases = report.num_compactions, len(report.rebases)
    changes = [each.kl or 0.0 for each in report.rebases] or [0.0]
    soak.median_rebase_kl, soak.worst_rebase_kl = median(changes), max(changes)
    soak.peak_bytes, soak.seconds = report.peak_bytes, time.perf_counter() - began
    return soak


def picture(soak: Soak, path: Path) -> None:
    """Resident memory and held slots, turn by turn."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, 1, sharex=True)
    turns = range(1, len(soak.rss) + 1)
    upper.plot(turns, [each / 2**20 for each in soak.rss], color="#1f5fa8")
    upper.set_ylim(0, 1.1 * max(soak.rss) / 2**20)
    upper.set_ylabel("process, MiB")
    lower.plot(turns, soak.held, color="#2f7d4f")
    lower.set_ylim(bottom=0)
    lower.set_ylabel("held slots")
    lower.set_xlabel("turn")
    figure.suptitle(f"{soak.tokens_seen} tokens under {soak.cap_bytes} bytes: {soak.compactions} compactions")
    figure.savefig(path, dpi=150)


def main() -> int:
    """Run, report, draw."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--turns", type=int, default=200)
    parser.add_argument("--cap", default="16MiB")
    parser.add_argument("--words", type=int, default=16, help="tokens of a reply, at most")
    parser.add_argument("--positions", type=int, default=0, help="of the model; default: its own")
    parser.add_argument("--policy", default="am-calibrated[probe_tokens=256]")
    parser.add_argument("--out", type=Path, default=Path("build/soak"))
    given = parser.parse_args()
    model, tokenizer = models.load(None, dtype=torch.float32)
    how = {"cap": given.cap, "words": given.words, "positions": given.positions, "policy": given.policy, "chunk": 256}
    soak = soaked(model, tokenizer, given.turns, **how)
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "report.json").write_text(json.dumps({**asdict(soak), "growth": soak.growth}, indent=1))
    picture(soak, given.out / "soak.png")
    for name, value in asdict(soak).items():
        if not isinstance(value, list):
            print(f"{name:22} {value}")
    print(f"{'growth':22} {soak.growth:.4f}")
    for fault in (faults := soak.faults()):
        print(f"FAULT: {fault}", file=sys.stderr)
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
