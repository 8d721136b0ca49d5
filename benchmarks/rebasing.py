"""Past the model's positions: perplexity of new text after re-basing, against fresh windows of the same recent text.

    python -m benchmarks.rebasing --text FILE --tokens 10240

The text is streamed through a capped memory with ``rebase=True``; the next tokens are then predicted one after another,
teacher-forced. A fresh window is stock memory that has read the last tokens before them, and nothing else.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

import agentmem
from agentmem import models
from agentmem.evaluation.passage import default_text, passage, read_text

PIECE = 32
"""Tokens of one forward whose every logit is wanted."""


def perplexity(model: Any, cache: Any, last: torch.Tensor, text: torch.Tensor) -> float:
    """Of ``text [n]`` behind ``last [1]``, which the cache has not read yet."""
    inputs, losses = torch.cat((last, text[:-1])), []
    with torch.no_grad():
        for begin in range(0, len(text), PIECE):
            span = slice(begin, begin + PIECE)
            logits = model(input_ids=inputs[None, span], past_key_values=cache).logits[0].float()
            losses.append(torch.nn.functional.cross_entropy(logits, text[span], reduction="sum"))
    return math.exp(float(sum(losses)) / len(text))


def fresh(model: Any, ids: torch.Tensor, new: torch.Tensor, window: int) -> float:
    """Stock memory of the last ``window`` tokens."""
    cache, recent = DynamicCache(config=model.config), ids[-window:]
    with torch.no_grad():
        model(input_ids=recent[None, :-1], past_key_values=cache, logits_to_keep=1)
    return perplexity(model, cache, recent[-1:], new)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--text", type=Path, help="a UTF-8 text; without it the shipped pages, over and over")
    parser.add_argument("--tokens", type=int, default=10240)
    parser.add_argument("--new", type=int, default=512)
    parser.add_argument("--slots", type=int, default=512)
    parser.add_argument("--policy", default="am-calibrated")
    given = parser.parse_args()
    model, tokenizer = models.load(None, dtype=torch.float32)
    text = default_text() * 8 if given.text is None else read_text(given.text)
    whole = passage(tokenizer, text, offset=0, tokens=given.tokens + given.new)
    ids, new = whole[: given.tokens], whole[given.tokens : given.tokens + given.new]
    with (
        agentmem.capped(
            model, cap="1GiB", policy=given.policy, tokenizer=tokenizer, max_slots=given.slots, rebase=True
        ) as memory,
        torch.no_grad(),
    ):
        model(input_ids=ids[None, :-1], past_key_values=memory, logits_to_keep=1)
        capped = perplexity(model, memory, ids[-1:], new)
        report = memory.report()
    print(f"{given.tokens + given.new} tokens, {model.config.max_position_embeddings} positions, {given.slots} slots")
    print(f"compactions {report.num_compactions}, re-basings {len(report.rebases)}")
    for each in report.rebases:
        moved = f"{each.position_before} -> {each.position_after}"
        print(f"  at {each.tokens_seen}: {moved}, gap {each.gap}, KL {each.kl:.4f}")
    print(f"perplexity, capped and re-based   {capped:.3f}")
    for window in (96, given.slots // 2, given.slots):
        stock = fresh(model, ids, new, window)
        print(f"perplexity, fresh window of {window:4}  {stock:.3f}   ratio {capped / stock:.3f}")


if __name__ == "__main__":
    main()
