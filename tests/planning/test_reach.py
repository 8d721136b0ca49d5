"""Plans of rows that are re-based: no more slots than a model has positions for."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from agentmem import Runtime, api, plugins
from agentmem.errors import SettingsRefused
from agentmem.planning.capacity import make_plan
from agentmem.planning.model_shape import LayerShape, ModelShape
from agentmem.settings import Settings
from agentmem.testing import tiny_model
from support import tiny, tiny_chat
from support.few_positions import watched
from support.matrices import in_turn

LLAMA = ModelShape("small", (LayerShape(2, 4, 16, 16),) * 3, 4, hidden=64, intermediate=96, vocabulary=128)
KINDS = ("window", "heavy-hitters", "am-halving", "am-halving[probe=live]", "am-halving[budgets=global]", "summary-am")


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_are_re_based_fit_the_model_s_positions(kind: str) -> None:
    """A full row and its probe stand on them, whatever the cap; without re-basing positions bound nothing."""
    shape = replace(LLAMA, positions=3000)
    on, off = (
        make_plan(shape, Settings.of(cap=1 << 30, rebase=rebase), plugins.policy(kind)) for rebase in (True, False)
    )

    assert on.capacity + on.probe_tokens <= 3000 * 7 // 8 < off.capacity
    unbounded = make_plan(LLAMA, Settings.of(cap=1 << 30, rebase=True), plugins.policy(kind))
    # turning keys takes workspace, which a fit and its check leave enough of
    assert unbounded.capacity == off.capacity if off.check_bytes else 0.9 * off.capacity < unbounded.capacity


def test_fewer_positions_than_slots_are_refused() -> None:
    """Named with the settings that need them."""
    shape = replace(LLAMA, positions=200)
    with pytest.raises(SettingsRefused, match=r"rebase: 226 slots per head, the fewest .+ more than 175 of the model"):
        make_plan(shape, Settings.of(cap=10_000_000, rebase=True), plugins.policy("window"))


@in_turn(
    kind=["window", "heavy-hitters", "key-norm", "am-halving[probe=live]", "am-halving"],
    positions=[128, 256],
)
def test_a_cap_with_room_for_more_slots_than_positions_goes_on(kind: str, positions: int) -> None:
    """A prompt of three times the positions and a reply of as many, with a probe and a chunk of half of them."""
    model = tiny_model("llama", max_position_embeddings=positions)
    settings = {"keep_first": 4, "keep_recent": 16, "chunk": positions // 2, "rebase": True}
    with watched(model) as seen, api.capped(model, cap="64MiB", policy=kind, **settings) as memory:
        model.generate(tiny.ids(3 * positions), past_key_values=memory, max_new_tokens=positions, do_sample=False)
        report = memory.report()

    assert max(seen) < positions
    assert report.num_compactions >= 3
    assert 3 <= len(report.rebases) <= 4 * report.num_compactions


@pytest.mark.parametrize("pieces", [(200, 1, 1, 30), (1,) * 40, (90, 90, 90, 1, 1)])
def test_direct_forwards_go_on_behind_a_full_row(pieces: tuple[int, ...]) -> None:
    """However the tokens come, the row is compacted before it is re-based."""
    model = tiny_model("llama", max_position_embeddings=128)
    settings = {"keep_first": 4, "keep_recent": 16, "rebase": True}
    with watched(model) as seen, api.capped(model, cap="64MiB", policy="window", **settings) as memory, torch.no_grad():
        for at in range(6):
            for each in pieces:
                model(tiny.ids(each, seed=at), past_key_values=memory, logits_to_keep=1)
        assert len(memory.report().rebases) >= 1
    assert max(seen) < 128


def test_sliding_windows_alone_are_re_based() -> None:
    """No probe ever runs, so only a forward's own tokens need positions."""
    model = tiny_model("mistral", max_position_embeddings=256, sliding_window=32)
    settings = {"keep_first": 4, "keep_recent": 16, "chunk": 128, "rebase": True}
    with watched(model) as seen, api.capped(model, cap="64MiB", policy="am-halving", **settings) as memory:
        model.generate(tiny.ids(700), past_key_values=memory, max_new_tokens=100, do_sample=False)
        assert len(memory.report().rebases) >= 2
    assert max(seen) < 256


def test_a_session_on_few_positions_goes_on() -> None:
    """Turn after turn with default settings but for the recent window, under a cap with room for far more slots."""
    on = tiny_model("llama", num_hidden_layers=2, max_position_embeddings=2048)
    with Runtime(on, tiny_chat.tokenizer(), cap="64MiB", rebase=True) as runtime, watched(on) as seen:
        session = runtime.session()
        for turn in range(20):
            session.append("user", f"turn {turn}: " + "tell me more of it " * 12)
            session.generate(max_new_tokens=8, do_sample=False)
        assert session.stats.tokens > 2 * 2048
        assert 1 <= session.stats.rebases <= 2 * session.stats.compactions
    assert max(seen) < 2048
