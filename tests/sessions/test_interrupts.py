"""Ctrl-C at lines drawn from all that a session runs: it goes on with the right tokens. All lines: benchmarks."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from agentmem.sessions import changes, ingestion
from benchmarks.interrupts import SCENARIOS, Line, chosen, interrupted, place, traced, trial, undisturbed
from support import tiny_chat

OURS = (
    *(f"sessions/{name}.py" for name in ("session", "runtime", "ingestion", "newest_request", "changes", "turn_steps")),
    "memory/pinning.py",
)
"""Where a session's own state is changed."""
SAMPLE = 6


@pytest.mark.parametrize("name", ["append", "read", "say", "fork", "save", "unpin", "request"])
def test_an_interrupt_at_any_line_leaves_a_session_that_goes_on(name: str, tmp_path: Path) -> None:
    """What was begun has taken effect or not, and afterwards all tokens are those of an undisturbed session."""
    lines, wanted = undisturbed(SCENARIOS[name], tmp_path)
    dice = random.Random(f"{name} 1")  # noqa: S311  # no secret
    places = [at for at in chosen(lines, 1, dice) if lines[at][0] in OURS]

    for at in dice.sample(places, min(SAMPLE, len(places))):
        assert trial(SCENARIOS[name], at, wanted, tmp_path) is None


def _lines_of(module: str, lines: list[Line]) -> list[int]:
    return [at for at, (file, _) in enumerate(lines) if file.endswith(module)]


def test_a_compaction_counts_with_its_report_or_not_at_all() -> None:
    """Wherever its end is interrupted, the sequence, reports and statistics count the same at once and later."""
    files = ("compaction/run.py", "engine/engine.py", "memory/memory.py", "memory/reports.py", "memory/sequence.py")
    lines: list[Line] = []
    with tiny_chat.runtime(1) as made:
        session = tiny_chat.filled(made, 50)
        with traced(lambda frame: lines.append(place(frame))):
            session.compact()
    last = {line: at for at, line in enumerate(lines)}

    for at in sorted(at for (file, _), at in last.items() if file in files)[-40:]:
        with tiny_chat.runtime(1) as made:
            session = tiny_chat.filled(made, 50)
            interrupted(session.compact, at)
            for _ in range(2):
                memory = session.memory
                counts = memory.sequences[0].compactions, session.stats.compactions, len(memory.compactions)
                assert len(set(counts)) == 1, (lines[at], counts)
                session.turn = None
                session.generate(max_new_tokens=1, do_sample=False, keep_open=True)


def test_changes_count_all_together_or_not_at_all(tmp_path: Path) -> None:
    """Wherever saying something is interrupted, ids, reply, entries and pins are all as before or all as after."""
    scenario = SCENARIOS["say"]
    lines, _ = undisturbed(scenario, tmp_path)

    def state(world: object) -> tuple[object, ...]:
        session = world.session  # type: ignore[attr-defined]  # a World
        reply = session.reply
        said = None if reply is None else (list(reply.ids), reply.text, reply.end)
        return list(session.ids), said, list(session.entries), session.dialogue, session.reply_start

    with (world := scenario.begin(tmp_path)).made:
        scenario.act(world)
        wanted = state(world)
    seen = []
    places = _lines_of("ingestion.py", lines) + _lines_of("changes.py", lines)
    for at in random.Random(2).sample(places, 3 * SAMPLE):  # noqa: S311  # no secret
        world = scenario.begin(tmp_path)
        with world.made:
            before = state(world)
            assert interrupted(lambda world=world: scenario.act(world), at) is not None  # type: ignore[misc]
            after = state(world)
            seen.append(after != before)
            assert after in (before, wanted)
            if not seen[-1]:
                scenario.act(world)
                assert state(world) == wanted
            assert world.session.before is None
    assert not all(seen)


def test_changes_that_were_not_put_back_are_put_back_by_the_next_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second interrupt, while what there was is put back, leaves it to whoever comes next."""
    with tiny_chat.runtime(1) as made:
        session, twin = made.session(), made.session()
        for each in (session, twin):
            each.append("user", "hello")

        def stop(*_: object) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(ingestion, "_take", stop)
            patch.setattr(changes, "put_back", stop)
            with pytest.raises(KeyboardInterrupt):
                session.append("user", "lost", pin=True)
        assert session.before is not None
        ids = tiny_chat.on(session, 5)
        assert session.before is None
        assert ids == tiny_chat.on(twin, 5)
        assert session.transcript.entries == twin.transcript.entries
