"""Re-basing: rows that go on past a model's positions, and what moves down with them, against float64 loops."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from agentmem import api
from agentmem.errors import MemoryCapExceeded
from agentmem.memory.pinning import pin
from agentmem.memory.positions import rebase
from agentmem.reporting.report import RebaseReport
from agentmem.testing import peak_allocated
from oracles import rope as reference_rope
from support import tiny
from support.few_positions import (
    FAMILIES,
    LIMIT,
    check_order,
    model,
    near_the_end,
    slots,
    state,
    stores,
    turns,
    watched,
)

EVERY = pytest.mark.parametrize("family", FAMILIES)


# ---- past the last position


@EVERY
def test_generation_goes_on_past_the_model_s_positions(family: str) -> None:
    """Three times as many tokens as positions under the smallest cap: no rotary call ever sees a position beyond."""
    with watched(model(family)) as seen, tiny.capped("replay", model(family), rebase=True) as memory:
        output = model(family).generate(
            tiny.ids(LIMIT * 3), past_key_values=memory, max_new_tokens=LIMIT // 2, do_sample=False,
            return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
        report = memory.report()
        check_order(memory)
    assert max(seen) < LIMIT
    assert torch.isfinite(torch.stack(output.logits)).all()
    assert len(report.rebases) >= 4
    assert not any(compaction.faults for compaction in report.compactions)
    assert [each.position_after < LIMIT // 2 + 16 for each in report.rebases] == [True] * len(report.rebases)


@pytest.mark.parametrize(
    ("kind", "pieces"),
    [("window", 7), ("heavy-hitters", 1), ("replay", 7), ("live+replay", 1), ("live+replay", 16), ("context", 3)],
)
def test_direct_forwards_stay_in_reach(kind: str, pieces: int) -> None:
    """Forwards of any length, after every one of which bytes, order and counts are right; slots stay as many."""
    with watched(model()) as seen, tiny.capped(kind, model(), rebase=True) as memory:
        memory.subscribe(lambda event: None if isinstance(event, RebaseReport) else check_order(memory))
        tiny.feed(memory, tiny.ids(20), model=model())
        tiny.feed(memory, tiny.ids(220, seed=1), pieces, model=model())
        row = memory.memory.sequences[0]
        assert row.next_position + row.shift == row.seen == 240
        assert row.moves == len(memory.report().rebases) >= 2
    assert max(seen) < LIMIT


def test_positions_that_a_caller_counts_go_on() -> None:
    """Forwards with position_ids that know nothing of re-basing give the bits of those without."""
    found = []
    for given in (False, True):
        with tiny.capped("window", model(), rebase=True) as memory:
            for start in range(0, 300, 6):
                more = {"position_ids": torch.arange(start, start + 6)[None]} if given else {}
                ids = tiny.ids(300)[:, start : start + 6]
                logits = model()(ids, past_key_values=memory, logits_to_keep=1, **more).logits
            found.append((state(memory), logits.tolist()))
            assert len(memory.report().rebases) >= 2
    assert found[0] == found[1]


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_a_later_turn_goes_on(family: str) -> None:
    """The whole conversation and no more in a second ``generate`` goes on like one that had not stopped."""
    prompt, settings = tiny.ids(LIMIT + 20), {"do_sample": False}
    with tiny.capped("replay", model(family), rebase=True) as memory:
        whole = model(family).generate(prompt, past_key_values=memory, max_new_tokens=LIMIT, **settings)
    with tiny.capped("replay", model(family), rebase=True) as memory:
        half = model(family).generate(prompt, past_key_values=memory, max_new_tokens=LIMIT // 2, **settings)
        settings["attention_mask"] = torch.ones_like(half)  # or generate takes id 0 for a pad
        rest = model(family).generate(half, past_key_values=memory, max_new_tokens=LIMIT // 2, **settings)
        assert len(memory.report().rebases) >= 3
    assert torch.equal(rest, whole)


@EVERY
def test_before_the_first_rebasing_the_option_changes_nothing(family: str) -> None:
    """Up to the first position that is out of reach, tokens and slots are to the bit those without the option."""
    found = []
    for option in (False, True):
        with tiny.capped("replay", model(family), rebase=option) as memory:
            output = model(family).generate(tiny.ids(70), past_key_values=memory, max_new_tokens=40, do_sample=False)
            found.append((output.tolist(), state(memory)))
            assert memory.report().rebases == ()
    assert found[0] == found[1]


def test_rows_of_a_batch_are_re_based_apart() -> None:
    """Of two rows with pads the longer is re-based first; each goes on as it does alone."""
    batch, lengths = tiny.ids(90).repeat(2, 1), (90, 70)
    mask = torch.ones_like(batch)
    mask[1, :20] = 0
    settings = {"max_new_tokens": 50, "do_sample": False}
    with watched(model()) as seen, tiny.capped_by(tiny.KINDS["replay"], model(), rebase=True) as memory:
        together = model().generate(batch * mask, attention_mask=mask, past_key_values=memory, **settings)
        rebases = memory.report().rebases
    assert max(seen) < LIMIT
    assert [each.row for each in rebases] == [0, 1]
    for row, length in enumerate(lengths):
        with tiny.capped_by(tiny.KINDS["replay"], model(), rebase=True) as memory:
            alone = model().generate(batch[:1, 90 - length :], past_key_values=memory, **settings)
            numbers = [(each.tokens_seen, each.position_after, each.gap) for each in memory.report().rebases]
        assert together[row, 90:].tolist() == alone[0, length:].tolist()
        assert numbers == [(each.tokens_seen, each.position_after, each.gap) for each in rebases if each.row == row]


# ---- where slots go


@EVERY
@pytest.mark.parametrize("kind", ["window", "replay"])
def test_slots_go_where_the_oracle_puts_them(kind: str, family: str) -> None:
    """The greatest gap with which each head fits half the positions; keys turn there, all else keeps its bits."""
    of = model(family)
    with tiny.capped(kind, of, rebase=True) as memory:
        near_the_end(memory, of)
        before = slots(memory)
        rebase(memory.memory, memory.engine.forwards, memory.memory.sequences[0])
        after, row, (report,) = slots(memory), memory.memory.sequences[0], memory.report().rebases
        full = [at for at, store in enumerate(stores(memory)) if store.spec.shape.window is None]
    start = 90 - 8
    middles = [head["positions"][4:-8].tolist() for at in full for head in before[at]]
    span = min(start - 4, max([LIMIT // 2 - 12, *map(len, middles)]))

    def widest(positions: list[int]) -> int:
        return max(wide for wide in range(1, span + 1) if reference_rope.fits(positions, start, span, wide))

    assert report.gap == min(map(widest, middles), default=span)
    assert (row.next_position, row.shift) == (4 + span + 8, 90 - 12 - span)
    for at, layers in enumerate(zip(before, after, strict=True)):
        for old, new in zip(*layers, strict=True):
            if at in full:
                middle = old["positions"][4:-8].tolist()
                places = reference_rope.places(middle, start, 4 + span, widest(middle))
                places = [0, 1, 2, 3, *places, *range(4 + span, 12 + span)]
                assert new["positions"].tolist() == places
                held = old["positions"].tolist()
            else:
                held = list(range(90 - len(old["keys"]), 90))
                places = [each - row.shift for each in held]
            moves = zip(old["keys"].double().tolist(), held, places, strict=True)
            wanted = [reference_rope.moved(key, here, there - here, turns(of, at)) for key, here, there in moves]
            # One turn in float32: four roundings, relative to the longest pair.
            atol = 4 * 2.0**-23 * float(old["keys"].abs().max()) * 2**0.5
            torch.testing.assert_close(new["keys"].double(), torch.tensor(wanted).double(), rtol=0, atol=atol)
            for name in ("values", "bias"):
                assert torch.equal(new[name], old[name])


@pytest.mark.parametrize("family", FAMILIES)
def test_where_all_slots_move_alike_nothing_is_forgotten(family: str) -> None:
    """Without a prefix the newest tokens are one run: the next tokens' logits stay, and the report's KL is nothing."""
    of, question = model(family), tiny.ids(5, seed=3)[0].tolist()
    with tiny.capped("window", of, rebase=True, keep_first=0) as memory:
        near_the_end(memory, of)
        before, row = memory.peek(question), memory.memory.sequences[0]
        rebase(memory.memory, memory.engine.forwards, row)
        assert row.shift == 90 - 64
        # float32 logits of magnitude 1 to 10: a few hundred roundings, as in test_families.
        torch.testing.assert_close(memory.peek(question), before, rtol=0, atol=1e-4)
        (report,) = memory.report().rebases
    assert report.kl is not None
    assert abs(report.kl) < 1e-6


def test_the_report_says_what_it_cost() -> None:
    """Its KL is that of the newest 16 tokens read again, in float64; positions, tokens and the event are the row's."""
    events: list[Any] = []
    with tiny.capped("replay", model(), rebase=True) as memory:
        memory.subscribe(events.append)
        near_the_end(memory, model())
        newest, peak = tiny.ids(90)[0, -16:].tolist(), memory.memory.ledger.peak
        before = memory.peek(newest).double().log_softmax(-1)
        rebase(memory.memory, memory.engine.forwards, memory.memory.sequences[0])
        after = memory.peek(newest).double().log_softmax(-1)
        (report,) = memory.report().rebases
        assert memory.memory.ledger.peak >= peak
    assert report.kl == pytest.approx(float((before.exp() * (before - after)).sum(-1).mean()), rel=1e-4)
    assert report.kl is not None
    assert report.kl > 1e-4
    assert (report.row, report.tokens_seen, report.position_before, report.position_after) == (0, 90, 90, 64)
    assert report.seconds > 0
    assert [event for event in events if isinstance(event, RebaseReport)] == [report]


def test_pinned_slots_move_along() -> None:
    """Before and after promotion, through many re-basings: order is kept, values too."""
    with tiny.capped("replay", model(), rebase=True) as memory:
        tiny.feed(memory, tiny.ids(30), model=model())
        row, core = memory.memory.sequences[0], memory.memory
        pin(core, row, 10, 12)
        pin(core, row, 20, 22)
        before = [layer[head]["values"][[10, 11, 20, 21]] for layer in slots(memory) for head in range(2)]
        for seed in range(10):
            tiny.feed(memory, tiny.ids(40, seed=seed), model=model())
            after = [layer[head] for layer in slots(memory) for head in range(2)]
            for old, new in zip(before, after, strict=True):
                assert torch.equal(new["values"][4:8], old)
                positions = new["positions"].tolist()
                assert positions[:8] == sorted(set(positions[:8]))
                assert len(set(positions)) == len(positions)
                assert positions[7] < positions[-8] == row.next_position - 8
        assert row.moves >= 4
        assert [store.promoted for store in stores(memory)] == [((10, 12), (20, 22))] * 2


@pytest.mark.parametrize("kind", ["live", "context"])
def test_stored_queries_are_turned_along(kind: str) -> None:
    """Each as far as the recent block goes, from the position of the token that asked it."""
    with tiny.capped(kind, model(), rebase=True) as memory:
        near_the_end(memory, model())
        row = memory.memory.sequences[0]
        for again in range(2):
            held = [(sample, sample.queries[:, : sample.filled].clone()) for layer in row.samples for sample in layer]
            shift, next_position = row.shift, row.next_position
            rebase(memory.memory, memory.engine.forwards, row)
            delta = row.next_position - next_position
            assert delta < 0
            for layer, (sample, before) in enumerate(held):
                at = [token - shift for token in sample.tokens(row.seen).tolist()]
                for old, new in zip(before, sample.queries, strict=True):
                    moves = zip(old.double().tolist(), at, strict=True)
                    wanted = [reference_rope.moved(query, here, delta, turns(model(), layer)) for query, here in moves]
                    atol = 4 * 2.0**-23 * float(old.abs().max()) * 2**0.5
                    got = new[: sample.filled].double()
                    torch.testing.assert_close(got, torch.tensor(wanted).double(), rtol=0, atol=atol)
            tiny.feed(memory, tiny.ids(30, seed=again), model=model())


# ---- memory


@pytest.mark.parametrize(("kind", "chunk"), [("window", 2), ("heavy-hitters", 4), ("live", 16)])
def test_the_peak_is_within_the_cap(kind: str, chunk: int) -> None:
    """Whatever is measured: the profiler's peak, less that of the model's forward of one chunk, stays under the cap."""
    with torch.no_grad():
        forward = peak_allocated(lambda: model()(tiny.ids(chunk), use_cache=False))

    def run() -> None:
        with torch.no_grad(), tiny.capped(kind, model(), rebase=True, chunk=chunk) as memory:
            model()(tiny.ids(LIMIT + 20), past_key_values=memory, logits_to_keep=1)
            assert len(memory.report().rebases) >= 1

    assert peak_allocated(run) - forward <= tiny.need(kind, model(), rebase=True, chunk=chunk)


def test_more_slots_than_positions_are_refused() -> None:
    """Slots that no gap is left between stay; at the last position: value, limit, remedy, and nothing is lost."""
    settings = tiny.SETTINGS | {"max_slots": LIMIT + 40, "rebase": True}
    said = r"left position 128, and 1 tokens more do not fit the model's 128 positions; lower the cap or chunk"
    with api.capped(model(), cap=1 << 24, policy="full", **settings) as memory, watched(model()) as seen:
        for start in range(LIMIT):
            tiny.feed(memory, tiny.ids(LIMIT)[:, start : start + 1], model=model())
        with pytest.raises(MemoryCapExceeded, match=said):
            tiny.feed(memory, tiny.ids(1), model=model())
        tiny.audit(memory.memory)
        assert (memory.transcript(), max(seen)) == (tiny.ids(LIMIT)[0].tolist(), LIMIT - 1)
        assert memory.report().rebases == ()
