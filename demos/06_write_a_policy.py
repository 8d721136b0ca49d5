"""Write a policy, check the invariants that every policy keeps, and let a session think with it.

    python demos/06_write_a_policy.py [--model NAME_OR_PATH] [--cap 8MiB] [--tokens 150] [--policy window]

The policy below merges neighbours: each run of slots becomes one, which has the run's newest key, the mean of its
values, and a β that lets it weigh as much as the whole run. Look at the invariants, which are checked on random memories of
awkward shapes, and at the table: its errors beside those of other policies, on the same text under the same cap.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch

import agentmem
from agentmem import Compaction, Compactor, HeadCompaction, Policy, Queries, Segment, models, plugins
from agentmem.contracts import HeadSegment, SegmentShape
from agentmem.policies.budgets.uniform import Uniform
from agentmem.testing import check_policy
from support.refusals import positive, run

# ---- the policy


class Neighbours(Compactor):
    """Makes one slot of every run of neighbouring slots; all runs of a head are equally long, or nearly."""

    fits = False  # nothing is fitted to the reference queries: they only measure the errors

    def workspace(self, shape: SegmentShape) -> int:
        """Bytes: a few numbers a slot and the weighted values of one head, and the results of all heads."""
        result = shape.heads * shape.budget * (8 + 4 + 4 * shape.value_dim)
        return result + shape.slots * (40 + 2 * 4 * shape.value_dim) + shape.budget * 64 + 4096

    def compact(self, segment: Segment, slots: Sequence[int]) -> Compaction:
        """``slots[h]`` runs of every head."""
        return Compaction(tuple(merged(head, count) for head, count in zip(segment.heads, slots, strict=True)))


def merged(head: HeadSegment, count: int) -> HeadCompaction:
    """``count`` runs: mass is the sum of exp(β) over a run, values are its mean by the same weights."""
    if not count:
        return HeadCompaction(torch.arange(0))
    ends = torch.arange(1, count + 1) * head.slots // count
    run = torch.searchsorted(ends, torch.arange(head.slots), right=True)
    top = head.bias.max()
    weight = (head.bias - top).exp()
    mass = torch.zeros(count).index_add_(0, run, weight)
    values = torch.zeros(count, head.values.shape[1]).index_add_(0, run, weight[:, None] * head.values)
    values /= mass[:, None]
    return HeadCompaction(kept=ends - 1, bias=mass.log_() + top, values=values)


def neighbours() -> Policy:
    """The composition: queries × budgets × compactor. An entry point of the group agentmem.policies could name it."""
    return Policy("neighbours", "runs of slots made one", "this demo", Neighbours(), Uniform(), Queries.of("replay"))


# ---- what it is worth


def mean(errors: Sequence[float | None]) -> str:
    """Of all compactions, where the policy's reference queries tell; a policy without a probe has none."""
    known = [error for error in errors if error is not None]
    return f"{sum(known) / len(known):.3f}" if known else "-"


def main() -> None:
    """Check it, use it, compare it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a Hugging Face id or path; default: the embedded model")
    parser.add_argument("--cap", default="8MiB")
    parser.add_argument("--policy", action="append", help="to compare with; default: am-halving")
    parser.add_argument("--tokens", type=positive, default=200, help="of the reply")
    given = parser.parse_args()

    others = [plugins.policy(name) for name in given.policy or ["am-halving"]]
    check = check_policy(neighbours())
    print(check)
    check.raise_if_broken()
    model, tokenizer = models.load(given.model)
    print(f"\n{'policy':14}{'compactions':>12}{'output error':>14}{'mass error':>12}   the end of the reply")
    with agentmem.Runtime(model, tokenizer, cap=given.cap, keep_recent=32) as runtime:
        for policy in (neighbours(), *others):
            with runtime.session(policy) as session:
                session.append("user", "Explain how a tower clock works, part by part, and why each part is there.")
                reply = session.generate(max_new_tokens=given.tokens, min_new_tokens=given.tokens, do_sample=False)
                name, reports = session.stats.policy, session.memory.compactions
            output, mass = mean([one.output_error for one in reports]), mean([one.log_mass_error for one in reports])
            print(f"{name:14}{len(reports):12}{output:>14}{mass:>12}   ...{reply.text[-40:]!r}")


if __name__ == "__main__":
    run(main)
