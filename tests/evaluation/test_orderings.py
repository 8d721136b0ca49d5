"""What each part of Attention Matching is worth, on the default model: orderings that must hold by a margin.

A short passage of the shipped pages is streamed under a few slots a head; KL is from full memory, over the positions
after the first compaction. Each ordering compares a policy with the same one without one mechanism, so a test fails if
the mechanism does nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from agentmem import plugins
from agentmem.contracts import Compaction, Policy, Segment
from agentmem.evaluation import Terms, recall
from agentmem.evaluation.facts import Quiz, documents
from agentmem.evaluation.fidelity import measure
from agentmem.evaluation.full_logits import full_logits
from agentmem.evaluation.passage import default_text
from agentmem.policies.compactors.attention_matching import AttentionMatching

TOKENS, SLOTS = 320, 160
TERMS = Terms(slots=SLOTS, keep_first=8, keep_recent=32, chunk=256)
Measured = Callable[[str | Policy], float]


@dataclass(frozen=True)
class Forgetful(AttentionMatching):
    """Attention Matching that takes every slot's β for 0, so that the fits of earlier compactions are dropped."""

    def compact(self, segment: Segment, slots: Any) -> Compaction:
        """Compact the segment without its β."""
        heads = tuple(replace(head, bias=torch.zeros_like(head.bias)) for head in segment.heads)
        found = super().compact(replace(segment, heads=heads), slots)
        fitted = (
            replace(each, bias=torch.zeros(each.kept.shape[0]) if each.bias is None else each.bias)
            for each in found.heads
        )
        return replace(found, heads=tuple(fitted))


@pytest.fixture(scope="module")
def kl(default_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Measured:
    """The mean KL of a policy after the first compaction; each is measured once."""
    model, tokenizer = default_model
    ids = tokenizer(default_text(), return_tensors="pt").input_ids[0, 400 : 401 + TOKENS]
    full, known = full_logits(model, ids, tmp_path_factory.mktemp("logits")), {}

    def measured(policy: str | Policy) -> float:
        made = plugins.policy(policy) if isinstance(policy, str) else policy
        if made.name not in known:
            found = measure(model, ids, full, made, TERMS, tokenizer=tokenizer)
            assert found.compactions[-1] >= 2
            known[made.name] = sum(found.kl[SLOTS:]) / len(found.kl[SLOTS:])
        return known[made.name]

    return measured


def test_matched_slots_beat_the_same_slots_evicted(kl: Measured) -> None:
    """Fits of β and values on the slots that an eviction by the same scores keeps."""
    assert kl("am-halving") < 0.7 * kl("am-halving[mass=none,values=own]")


def test_calibrated_budgets_beat_equal_ones(kl: Measured) -> None:
    """The same slots in all, shared out by the model's table."""
    assert kl("am-calibrated") < 0.8 * kl("am-halving")


def test_a_carried_beta_beats_a_dropped_one(kl: Measured) -> None:
    """The β of earlier compactions is part of the next segment's mass."""
    policy = plugins.policy("am-halving")
    dropped = replace(policy, name="forgetful", compactor=Forgetful())
    assert kl("am-halving") < 0.9 * kl(dropped)


def test_enough_queries_beat_few(kl: Measured) -> None:
    """256 reference tokens instead of 24 for the same slots."""
    assert kl("am-halving") < 0.8 * kl("am-halving[probe_tokens=24]")


def test_a_probe_of_the_whole_text_recalls_what_recent_replay_forgets(default_model: Any) -> None:
    """Facts planted at the start, asked for three compactions later: spread probe, pattern and carried importance."""
    model, tokenizer = default_model
    quiz = Quiz(tokens=352, facts=3, depths=(0.1, 0.2, 0.3))
    (document,) = documents(tokenizer, default_text(), quiz, keep_first=TERMS.keep_first)

    def log_prob(spec: str) -> float:
        found = recall.measure(model, document, plugins.policy(spec), TERMS, tokenizer=tokenizer)
        return sum(answer.log_prob for answer in found.answers) / len(found.answers)

    assert log_prob("am-recall[budgets=uniform]") > log_prob("am-halving") + 2
