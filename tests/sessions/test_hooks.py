"""What a caller is asked before a compaction, may answer, and is told after it."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest

from agentmem.errors import CompactionFailed, SettingsRefused, TurnEnded
from agentmem.reporting.report import CompactionReport
from agentmem.sessions import CompactionContext, Session
from agentmem.sessions.conversation import Interrupted, Watch
from support import talk

SYSTEM, QUESTION = "You are terse.", "What is the capital of France?"
Answer = Callable[[CompactionContext], str]


class Caller:
    """Answers what it was told to, and remembers what it was asked and told."""

    def __init__(self, answer: Answer | str) -> None:
        self.answer = answer
        self.asked: list[CompactionContext] = []
        self.told: list[CompactionReport] = []

    def before(self, context: CompactionContext) -> str:
        """Answer."""
        self.asked.append(context)
        return self.answer if isinstance(self.answer, str) else self.answer(context)

    def after(self, report: CompactionReport) -> None:
        """Remember."""
        self.told.append(report)


def opened(caller: Caller, **settings: object) -> Session:
    """A session of 64 slots per head with that caller's hooks, soon full."""
    made = talk.runtime().session(
        "window",
        extra_policies=("key-norm", "am-halving"),
        before_compact=caller.before,
        after_compact=caller.after,
        **(talk.TIGHT | settings),
    )
    talk.audited(made).append("system", SYSTEM)
    return made


def test_proceed_compacts_at_the_soft_limit() -> None:
    """Asked when less than the soft part is free, before the memory is full; every report is told, in order."""
    caller = Caller("proceed")
    with opened(caller, soft=0.25) as session:
        session.append("user", QUESTION * 6)
        talk.greedy(session, 60)
        assert len(caller.asked) >= 3
        assert all(not context.full and context.room <= 16 for context in caller.asked)
        assert {context.policy for context in caller.asked} == {"window"}
        assert caller.asked[0].policies == ("window", "key-norm", "am-halving")
        assert [context.tokens_seen for context in caller.asked] == [report.tokens_seen for report in caller.told]
        assert [context.total_slots for context in caller.asked] == [report.slots_before for report in caller.told]
        assert tuple(caller.told) == tuple(session.memory.compactions)


def test_without_a_soft_limit_only_a_full_memory_is_asked_for() -> None:
    """``soft=0`` asks when there is no room at all."""
    caller = Caller("proceed")
    with opened(caller, soft=0.0) as session:
        session.append("user", QUESTION * 12)
        assert len(caller.asked) == len(caller.told) >= 2
        assert all(context.full and context.room == 0 for context in caller.asked)


def test_postpone_asks_again_when_more_room_is_used_up() -> None:
    """Not at every token: at the soft limit, after another ``min_reclaim`` tokens, and when the memory is full."""
    caller = Caller(lambda context: "proceed" if context.full else "postpone")
    with opened(caller, soft=0.25) as session:
        session.append("user", QUESTION * 4)
        talk.greedy(session, 40)
        first = next(at for at, context in enumerate(caller.asked) if context.full)
        rooms = [context.room for context in caller.asked[: first + 1]]
        assert rooms[0] <= 16
        assert len(rooms) >= 3
        assert all(one - other >= 4 for one, other in pairwise(rooms[:-1]))
        assert len(caller.told) == sum(context.full for context in caller.asked)


def test_where_there_is_nothing_to_reclaim_nobody_is_asked_at_every_token() -> None:
    """Above what a compaction would leave, ``proceed`` does nothing, and the next question comes as after a no."""
    caller = Caller("proceed")
    with opened(caller, soft=0.5, target=0.75) as session:
        session.append("user", QUESTION)
        kinds = [event.type for event in session.stream(max_new_tokens=30, do_sample=False)]
        assert kinds.count("compaction_started") == kinds.count("compaction_finished") == len(caller.told)
        first = next(at for at, context in enumerate(caller.asked) if context.total_slots > 48 * 4)
        seen = [context.tokens_seen for context in caller.asked[: first + 1]]
        assert len(seen) >= 3
        assert all(other - one >= 4 for one, other in pairwise(seen))
        assert len(caller.told) == len(caller.asked) - first


def test_veto_holds_until_the_memory_is_full() -> None:
    """Asked once at the soft limit and once at the hard one; a compaction ends the veto."""
    caller = Caller(lambda context: "proceed" if context.full else "veto")
    with opened(caller, soft=0.25) as session:
        session.append("user", QUESTION * 4)
        talk.greedy(session, 60)
        fulls = [context.full for context in caller.asked]
        assert fulls[:4] == [False, True, False, True]
        assert len(caller.told) == fulls.count(True) >= 2


@pytest.mark.parametrize("answer", ["postpone", "veto"])
@pytest.mark.parametrize("writing", [False, True])
def test_at_the_hard_limit_a_no_ends_the_turn(answer: str, writing: bool) -> None:
    """The session is valid: what was read and written stays, and with another answer it goes on where it was."""
    caller, free = Caller(answer), Caller("proceed")
    with opened(caller, soft=0.0) as session, opened(free, soft=0.0) as other:
        for each in (session, other):
            each.append("user", QUESTION if writing else "Hi.")
        if writing:
            with pytest.raises(TurnEnded, match=r"64 slots per head, 64 tokens seen.*before_compact said no"):
                session.generate(max_new_tokens=60, do_sample=False, keep_open=True)
            written = len(session.transcript.ids_of(session.transcript.entries[-1]))
            assert 0 < written < 60
        else:
            with pytest.raises(TurnEnded, match=r"answer 'proceed' or a policy when context\.full is true"):
                session.append("user", QUESTION * 12)
            assert session.stats.pending > 1
        stats = session.stats
        assert (stats.room, stats.compactions, stats.state) == (0, 0, "idle")
        with pytest.raises(TurnEnded):
            session.generate(max_new_tokens=60, keep_open=True)

        caller.answer = "proceed"
        if writing:
            reply = session.generate(max_new_tokens=60 - written, do_sample=False)
            assert reply.ids == talk.greedy(other, 60)
        else:
            other.append("user", QUESTION * 12)
            assert talk.greedy(session, 20) == talk.greedy(other, 20)
        assert list(session.ids) == list(other.ids)
        assert caller.told
        assert [report.tokens_seen for report in caller.told] == [report.tokens_seen for report in free.told]


@pytest.mark.parametrize("soft", [0.0, 0.25])
def test_another_policy_may_be_answered(soft: float) -> None:
    """By its name; that compaction is its, and the others stay the session's own."""
    caller = Caller(lambda context: "am-halving" if len(caller.told) % 2 else "proceed")
    with opened(caller, soft=soft) as session:
        session.append("user", QUESTION * 30)
        assert [report.policy for report in caller.told[:4]] == ["window", "am-halving", "window", "am-halving"]
        assert [report.queries for report in caller.told[:2]] == ["none", "replay"]


def test_an_unknown_answer_is_refused() -> None:
    """With what may be answered; nothing was compacted, and the session goes on with a better answer."""
    caller = Caller("later")
    with opened(caller) as session:
        with pytest.raises(SettingsRefused, match=r"answered 'later'; it may answer 'proceed'.*'am-halving'"):
            session.append("user", QUESTION * 12)
        assert session.stats.compactions == 0
        caller.answer = "proceed"
        assert len(talk.greedy(session, 5)) == 5
        assert session.stats.compactions > 0


def test_a_hook_that_raises_ends_the_turn() -> None:
    """Its own error comes out, before the compaction or after it; the session is valid and goes on."""

    def broken(_: object) -> str:
        raise KeyError("mine")

    caller = Caller(broken)
    with opened(caller) as session:
        with pytest.raises(KeyError, match="mine"):
            session.append("user", QUESTION * 12)
        assert (session.stats.compactions, session.stats.state) == (0, "idle")
        caller.answer, session.hooks.after = "proceed", broken  # type: ignore[assignment]
        with pytest.raises(KeyError, match="mine"):
            talk.greedy(session, 5)
        assert (session.stats.compactions, session.stats.state) == (1, "idle")
        session.hooks.after = caller.after
        assert len(talk.greedy(session, 5)) == 5


def test_a_hook_cannot_use_the_session_that_asks_it() -> None:
    """It is in mid-turn; whatever the hook tries is refused, and the turn goes on if the hook does."""
    refusals: list[str] = []

    def curious(_: CompactionContext) -> str:
        for call in (lambda: session.append("user", "x"), session.compact, session.fork, lambda: session.say("x")):
            with pytest.raises(SettingsRefused, match="mid-turn"):
                call()
            refusals.append("refused")
        return "proceed"

    with opened(Caller(curious)) as session:
        session.append("user", QUESTION * 8)
        assert len(refusals) >= 4
        assert session.stats.compactions >= 1


def test_a_compaction_by_hand_is_told_but_not_asked() -> None:
    """Without ``force`` it waits for the soft limit; with nothing to reclaim it is ``None`` and nothing is told."""
    caller = Caller("veto")
    with opened(caller) as session:
        assert session.compact() is None
        session.append("user", QUESTION * 3)
        assert session.compact(force=False) is None
        report = session.compact(focus="France", policy="am-halving", target=0.5)
        assert caller.asked == []
        assert caller.told == [report]
        assert report is not None
        assert (report.policy, report.queries) == ("am-halving", "focus+replay")
        with pytest.raises(SettingsRefused, match="runs no probe"):
            session.compact(focus="France")


def test_a_failed_compaction_is_told_as_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """With ``on_failure="raise"`` the turn ends with it, nothing is told, and the next turn tries again."""
    caller = Caller("proceed")
    with opened(caller, on_failure="raise") as session:
        compactor = type(session.memory.policy.compactor)
        with monkeypatch.context() as patch:
            patch.setattr(compactor, "compact", lambda *_: 1 / 0)
            with pytest.raises(CompactionFailed, match="ZeroDivisionError"):
                session.append("user", QUESTION * 12)
        assert caller.told == []
        assert len(talk.greedy(session, 5)) == 5
        assert len(caller.told) == session.stats.compactions > 0


def test_an_interrupted_compaction_is_told_of_when_it_is_finished(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call of compact finishes it first; its report is returned and told, once, where nothing is left to reclaim."""
    caller = Caller("proceed")
    with opened(caller) as session:
        session.append("user", QUESTION * 4)
        row, check, layers = session.memory.sequences[0], Watch.check, list[int]()

        def cut(watch: Watch) -> None:
            if row.job is not None:
                layers.append(1)
                if len(layers) == 2:
                    raise Interrupted("cancelled")
            check(watch)

        monkeypatch.setattr(Watch, "check", cut)
        assert session.compact() is None
        assert row.job is not None
        assert caller.told == []
        found = session.compact()
        assert found is not None
        assert row.job is None
        assert caller.told == [found] == session.memory.compactions
        assert session.compact() is None
