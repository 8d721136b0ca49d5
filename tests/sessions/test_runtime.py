"""One cap for many sessions: leases, idle memories that be preempted in stages, refusals, threads, and the end."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

from agentmem import plugins
from agentmem.errors import AgentmemError, CompactionFailed, MemoryClosed, RuntimeBusy, SettingsRefused
from agentmem.reporting.report import CompactionReport
from agentmem.sessions import CompactionContext, Runtime, Session
from agentmem.sessions.conversation import Interrupted
from support import tiny, tiny_chat


def begun(session: Session) -> Any:
    """A turn of a session that has begun and not ended."""
    turn = session.stream(max_new_tokens=4, do_sample=False)
    next(turn)
    return turn


def interrupt(session: Session) -> None:
    """Begin a compaction of a session and end it before its second layer."""
    calls = []

    def stop() -> None:
        calls.append(1)
        if len(calls) == 2:
            raise Interrupted("cancelled")

    session.runtime.admit(session, stop)
    session.memory.boundary = stop
    with pytest.raises(Interrupted):
        session.engine.compact(session.memory.sequences[0])
    session.runtime.end(session, stop)
    assert session.memory.sequences[0].job is not None


# ---- preemption


def test_idle_memories_give_way_in_stages_the_longest_idle_first() -> None:
    """Room is taken first, from the longest idle; then they go to disk; whoever is used comes back whole."""
    with tiny_chat.runtime(2.2, pressure=("trim", "disk")) as made, tiny_chat.watched(made.cap):
        sessions: list[Session] = []
        while not sessions or sessions[0].stats.state == "idle":
            sessions.append(tiny_chat.filled(made, 100, seed=len(sessions)))
            tiny_chat.audit(made)
        stats = [each.stats for each in sessions]
        assert [each.state for each in stats] == ["on disk", *["idle"] * (len(stats) - 1)]
        assert [each.charged_bytes for each in stats][:: len(stats) - 1] == [0, stats[0].lease_bytes]
        assert all(0 < each.charged_bytes < each.lease_bytes for each in stats[1:-1])
        assert {each.tokens for each in stats} == {100}

        first, second = sessions[:2]
        ids = tiny_chat.on(first)
        assert first.stats.charged_bytes == first.stats.lease_bytes
        assert second.stats.state == "on disk"
        tiny_chat.audit(made)
    with tiny_chat.runtime(2) as made:
        assert tiny_chat.on(tiny_chat.filled(made)) == ids


def test_what_is_charged_is_told_by_kind() -> None:
    """Leases of running turns and of idle memories, each as what is held and the room beside it; and all tokens fed."""
    with tiny_chat.runtime(2) as made:
        before = made.stats.fed_tokens
        idle, other = tiny_chat.filled(made, 40), tiny_chat.filled(made, 40, seed=1)
        with closing(other.stream(max_new_tokens=8, do_sample=False)) as events:
            next(events)
            stats = made.stats
            held = [each.memory.ledger.resident for each in (idle, other)]
            assert [stats.idle_bytes, stats.running_bytes] == held
            assert stats.idle_bytes + stats.idle_room_bytes == idle.stats.charged_bytes
            assert stats.running_bytes + stats.running_room_bytes == other.stats.lease_bytes
            assert stats.charged_bytes == idle.stats.charged_bytes + other.stats.charged_bytes
        stats = made.stats
        assert (stats.running_bytes, stats.running_room_bytes) == (0, 0)
        read = [each.stats.tokens - each.stats.pending for each in (idle, other)]
        assert stats.fed_tokens - before == sum(read)


def test_nobody_gives_way_for_nothing() -> None:
    """Where all idle memories together could not make room, none is trimmed, compacted or moved."""
    with tiny_chat.runtime(2) as made:
        active, idle = tiny_chat.filled(made), tiny_chat.filled(made, seed=1)
        large = made.session(share=made.cap)
        turn = begun(active)
        with pytest.raises(RuntimeBusy, match=r"1 session\(s\) are in mid-turn"):
            large.read("hello")
        assert idle.holding.stage is None
        turn.close()
        large.read("hello")
        assert [active.stats.state, idle.stats.state] == ["on disk"] * 2


def test_a_refusal_changes_nothing_and_says_what_there_is() -> None:
    """Two turns hold the cap: the third is refused with the bytes, and goes on when one of them has ended."""
    with tiny_chat.runtime(2, pressure=()) as made:
        sessions = [made.session(name=name) for name in ("ann", "bob", "eve")]
        for session in sessions[:2]:
            session.read("hello there")
        turn = begun(sessions[0])
        with pytest.raises(RuntimeBusy, match=rf"'eve' needs .*\({made.cap // 2} bytes\).*{made.cap} are charged"):
            sessions[2].read("hello")
        turn.close()
        assert not sessions[2].busy
        with pytest.raises(RuntimeBusy, match="cannot be preempted"):  # idle ones keep their leases without stages
            sessions[2].read("hello")
        sessions[1].close()
        sessions[2].read("hello")
        tiny_chat.audit(made)


@pytest.mark.parametrize("pressure", [("trim", "compact"), ("compact",)])
def test_an_idle_memory_is_compacted_once_and_its_session_is_told(pressure: tuple[str, ...]) -> None:
    """The stage ``compact`` halves the segments inside the cap, is told like any compaction, and never repeats."""
    told: list[CompactionReport] = []
    with tiny_chat.runtime(2, pressure=pressure) as made, tiny_chat.watched(made.cap) as peak:
        idle = tiny_chat.filled(made, 70, after_compact=told.append)
        before, compactions = idle.stats, len(told)
        for part in (0.8, 0.87, 0.89):  # trimming makes room for the first
            other = made.session(share=part)
            try:
                other.read("hello")
            except RuntimeBusy:
                assert made.leases.left < part * made.cap
            other.close()
        assert peak[0] <= made.cap
        assert len(told) == compactions + 1
        assert (idle.stats.compactions, idle.stats.total_slots) == (len(told), told[-1].slots_after)
        segments = [each.total_slots - 6 * 12 for each in (before, idle.stats)]  # 6 heads; 4 + 8 slots stay
        assert segments[1] == segments[0] // 12 * 6
        room = idle.stats.room
        assert tiny_chat.on(idle, 1)
        assert idle.stats.room == room - 1 > before.room
        tiny_chat.audit(made)


@pytest.mark.parametrize(("policy", "leases"), [("window", 1.5), ("am-halving", 1.4)])
def test_an_idle_memory_with_more_pins_than_prefix_is_compacted(policy: str, leases: float) -> None:
    """Pins that no compaction had moved to the front yet are counted there, and another session gets its bytes."""
    with tiny_chat.runtime(leases, policy, pressure=("trim", "compact"), slots=96) as made:
        first, second = made.session(), made.session()
        first.append("system", "x" * 10)
        pinned = first.stats.pinned_tokens
        first.read(tiny_chat.ids(60))
        assert pinned > first.memory.plan.prefix
        second.read(tiny_chat.ids(20))
        assert first.stats.compactions == 1
        assert first.stats.pinned_tokens == pinned
        assert tiny_chat.on(first)


def test_a_hook_can_keep_an_idle_memory_as_it_is() -> None:
    """``before_compact`` is asked before an idle memory is compacted, and a veto leaves the disk as the next stage."""
    asked: list[CompactionContext] = []

    def veto(context: CompactionContext) -> str:
        asked.append(context)
        return "proceed" if context.full else "veto"

    with tiny_chat.runtime(2, pressure=("compact", "disk")) as made:
        idle = tiny_chat.filled(made, 50, before_compact=veto)
        asked.clear()
        compactions, ids = idle.stats.compactions, list(idle.ids)
        others = [tiny_chat.filled(made, 20, seed=seed) for seed in (1, 2)]
        assert [context.full for context in asked] == [False]
        assert idle.stats.state == "on disk"
        others[0].close()
        idle.read("on")
        assert idle.stats.compactions == compactions
        assert list(idle.ids[: len(ids)]) == ids


def test_what_an_interrupt_left_is_finished_before_bytes_are_given_back() -> None:
    """Trimming or moving a memory whose compaction was interrupted finishes that first, inside its lease, and tells."""
    for stage in ("trim", "disk"):
        told: list[CompactionReport] = []
        with tiny_chat.runtime(2, pressure=(stage,)) as made, tiny_chat.watched(made.cap):
            session, twin = tiny_chat.filled(made, 62, after_compact=told.append), tiny_chat.filled(made, 62)
            twin.compact()
            expected = tiny_chat.on(twin)
            twin.close()
            interrupt(session)
            told.clear()
            large = made.session(share=made.cap - session.stats.lease_bytes + 1000)
            large.read("hello")
            assert len(told) == 1
            assert session.stats.charged_bytes < session.stats.lease_bytes
            large.close()
            assert tiny_chat.on(session) == expected


def test_a_compaction_that_fails_keeps_only_its_own_session_from_going_on() -> None:
    """A memory that cannot finish its compaction gives no way; another session is refused, not failed."""
    broken = plugins.policy("am-halving")
    errors: list[BaseException] = []
    faulty = tiny.Faulty(broken.compactor, 2, errors)  # type: ignore[arg-type]  # am-halving has one
    policy = type(broken)(**{**{f: getattr(broken, f) for f in broken.__dataclass_fields__}, "compactor": faulty})
    with tiny_chat.runtime(2, policy, pressure=("trim", "disk"), on_failure="raise") as made:
        session = tiny_chat.filled(made, 62)
        interrupt(session)
        errors += [RuntimeError("broken")] * 4
        other = made.session(share=made.cap - 1000)
        with pytest.raises(RuntimeBusy):
            other.read("hello")
        errors += [RuntimeError("broken")] * 2
        with pytest.raises(CompactionFailed):
            session.read("hello")
        errors.clear()
        assert tiny_chat.on(session)


# ---- folders


def test_a_spill_folder_that_cannot_be_written_loses_nothing(tmp_path: Path) -> None:
    """The asking session is told of the folder and the remedy; the idle one goes on as it was."""
    place = tmp_path / "spill"
    place.write_text("no folder")
    with tiny_chat.runtime(1, pressure=("trim", "disk"), spill=place) as made:
        session, twin = tiny_chat.filled(made), made.session()
        with pytest.raises(AgentmemError, match=r"spill.*Nothing is lost.*pressure"):
            twin.read("hello")
        assert session.stats.state == twin.stats.state == "idle"
        tiny_chat.audit(made)
        place.unlink()
        ids = tiny_chat.on(session)
        twin.read(tiny_chat.ids(100))
        assert tiny_chat.on(twin) == ids
        assert session.stats.state == "on disk"
        assert len(list(place.rglob("idle-*"))) == 1
    assert {path.name for path in place.rglob("*")} <= {"spill.lock"}


def test_a_memory_that_is_lost_on_disk_is_told_to_its_session_alone(tmp_path: Path) -> None:
    """A damaged file refuses its session's next turn; the others go on, and the runtime closes in order."""
    with tiny_chat.runtime(1, pressure=("disk",), spill=tmp_path) as made:
        session, other = tiny_chat.filled(made), tiny_chat.filled(made)
        for file in tmp_path.rglob("tensors-*"):
            file.write_bytes(b"damage")
        with pytest.raises(AgentmemError, match="tensors-"):
            session.read("hello")
        assert not session.busy
        assert tiny_chat.on(other)
    assert [path.name for path in tmp_path.iterdir()] == ["spill.lock"]


def test_temporary_folders_go_with_the_runtime() -> None:
    """Without a spill folder idle memories go to one of this user's, which is gone after close."""
    with tiny_chat.runtime(1, pressure=("disk",)) as made:
        tiny_chat.filled(made, 20)
        tiny_chat.filled(made, 20)
        folder = made.folder()
        assert len(list(folder.glob("idle-*"))) == 1
    assert not folder.exists()
    made.close()


# ---- one model


def test_the_model_is_left_as_it_was() -> None:
    """After close, in the middle of turns too, no hook, no renamed attention and no guarded ``generate`` is left."""
    model = tiny_chat.model(seed=3)
    before = model.config._attn_implementation, dict(vars(model)), len(model._forward_pre_hooks)
    logits = model(torch.tensor([tiny_chat.ids(9)])).logits
    made = tiny_chat.runtime(2, on=model)
    session, other = tiny_chat.filled(made), tiny_chat.filled(made)
    turn, hooks = begun(session), model.get_decoder()._forward_pre_hooks
    assert hooks
    made.close()
    assert (model.config._attn_implementation, dict(vars(model)), len(model._forward_pre_hooks)) == before
    assert not hooks
    with pytest.raises(MemoryClosed):
        list(turn)
    for call in (session.fork, lambda: other.read("x"), made.session, lambda: session.save("x")):
        with pytest.raises(MemoryClosed, match="closed"):
            call()  # type: ignore[operator]  # one of several kinds
    assert session.stats.state == other.stats.state == "closed"
    assert torch.equal(model(torch.tensor([tiny_chat.ids(9)])).logits, logits)


def test_two_runtimes_share_a_model() -> None:
    """Each has its own cap and sessions; closing one in mid-turn leaves the other's turn as it is."""
    with tiny_chat.runtime(1) as alone:
        expected = tiny_chat.on(tiny_chat.filled(alone), 12)
    left, right = tiny_chat.runtime(1), tiny_chat.runtime(1)
    sessions = [tiny_chat.filled(left), tiny_chat.filled(right)]
    turns = [each.stream(max_new_tokens=12, do_sample=False, keep_open=True) for each in sessions]
    for _ in range(4):
        for turn in turns:
            next(turn)
    left.close()
    list(turns[1])
    assert list(sessions[1].ids[-12:]) == expected
    assert left.scheduler is right.scheduler
    right.close()


def test_threads_with_sessions_of_their_own_do_not_disturb_one_another() -> None:
    """Six threads under a cap for two, forks and closes among them: each gets its tokens, or a clear refusal."""
    with tiny_chat.runtime(6) as alone:
        expected = [tiny_chat.on(tiny_chat.filled(alone, 60, seed), 10) for seed in range(6)]
    with tiny_chat.runtime(2.5, pressure=("trim", "disk")) as made, tiny_chat.watched(made.cap):

        def work(seed: int) -> list[int]:
            session = made.session()
            patiently(lambda: session.read(tiny_chat.ids(60, seed)))
            session.fork().close()
            ids: list[int] = patiently(lambda: tiny_chat.on(session, 10))
            session.close()
            return ids

        def patiently(call: Any) -> Any:
            while True:
                try:
                    return call()
                except RuntimeBusy:
                    assert made.stats.active >= 1 or made.stats.charged_bytes <= made.cap
                    idle.wait(0.002)

        idle = threading.Event()
        with ThreadPoolExecutor(6) as pool:
            assert list(pool.map(work, range(6))) == expected
        assert made.stats.charged_bytes == 0


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"pressure": ("trim", "burn")}, r"\['burn'\] unknown; stages are trim, compact, disk"),
        ({"cap": "lots"}, "cannot read 'lots'"),
    ],
)
def test_a_runtime_that_cannot_work_is_refused(given: dict[str, Any], said: str) -> None:
    """Unknown stages and caps that are none are refused before anything is attached."""
    with pytest.raises(SettingsRefused, match=said):
        Runtime(tiny_chat.model(), tiny_chat.tokenizer(), **{"cap": "1MiB"} | given)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"seed": 1 << 70}, "seed"),
        ({"share": 1.5}, "share"),
        ({"share": "1GiB"}, "more than the runtime's cap"),
        ({"cap": 5}, "the runtime's"),
        ({"keep_recnt": 5}, "keep_recnt"),
        ({"tools": [{"type": "function", "function": {"name": "x"}}]}, "tools"),
    ],
)
def test_a_session_that_cannot_work_is_refused_and_attaches_nothing(given: dict[str, Any], said: str) -> None:
    """Whatever is wrong, no lease, no session and no hook stays behind."""
    with tiny_chat.runtime(1, on=tiny_chat.model(seed=4)) as made:
        with pytest.raises(SettingsRefused, match=said):
            made.session(**given)
        assert made.sessions == made.leases.holdings == []
        assert not made.model._forward_pre_hooks
