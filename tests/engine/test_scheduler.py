"""Who is fed next: order, shares of a forward, patience, and waiting for those who were fed last."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from agentmem.engine import Scheduler, Want, scheduler
from agentmem.engine.feeding import Outcome

Shares = list[tuple[str, int]]
NOBODY: Any = None


def want(name: str, tokens: int = 1, **more: Any) -> Want:
    """What a turn of that name wants."""
    return Want(NOBODY, range(tokens), name, **more)


@pytest.fixture
def fed(monkeypatch: pytest.MonkeyPatch) -> list[Shares]:
    """What each forward fed; outcomes are there at once."""
    found: list[Shares] = []

    def feed(shares: Sequence[tuple[Want, int]]) -> None:
        found.append([(str(each.turn), count) for each, count in shares])
        for each, count in shares:
            each.outcome = Outcome(count)

    monkeypatch.setattr(scheduler, "feed", feed)
    return found


def submitted(*wants: Want) -> Scheduler:
    """A scheduler where these wait, in this order."""
    made = Scheduler()
    for each in wants:
        made.submit(each)
    return made


def test_one_forward_feeds_all_that_wait(fed: list[Shares]) -> None:
    """Whoever steps feeds everybody; who has an outcome by then feeds nobody."""
    wants = [want("a"), want("b"), want("c")]
    made = submitted(*wants)
    made.step(wants[1])
    made.step(wants[0])
    assert fed == [[("a", 1), ("b", 1), ("c", 1)]]
    assert all(each.done for each in wants)


def test_single_tokens_come_first_and_texts_share_what_is_left(fed: list[Shares]) -> None:
    """Replies take one token each; texts, in the order of asking, fill up to the fewest tokens that a turn allows."""
    texts = [want("long", 90, most=64), want("late", 90, most=64)]
    made = submitted(*texts, want("a", most=64), want("b", most=50))
    made.step(texts[0])
    assert fed == [[("a", 1), ("b", 1), ("long", 48)]]
    assert not texts[1].done


def test_who_is_alone_is_fed_whole(fed: list[Shares]) -> None:
    """Nobody is delayed by a long piece then."""
    alone = want("a", 90, most=64)
    submitted(alone).step(alone)
    assert fed == [[("a", 90)]]


def test_higher_priority_comes_first(fed: list[Shares]) -> None:
    """A text of higher priority before a token of lower, equal ones as before."""
    low = want("low", most=4)
    submitted(low, want("text", 3, priority=1, most=4), want("high", priority=2, most=4)).step(low)
    assert fed == [[("high", 1), ("text", 3)]]


def test_nobody_is_passed_over_for_ever(fed: list[Shares]) -> None:
    """Under a stream of more urgent turns that fill every forward, one of the least priority is fed in the fifth."""
    patient, made = want("patient", priority=-100, most=2), Scheduler()
    made.submit(patient)
    while not patient.done:
        urgent = [want(f"urgent {at}", most=2) for at in range(2)]
        for each in urgent:
            made.submit(each)
        made.step(patient)  # asked with those that it fed last: nobody is waited for
        made.step(urgent[0])
        if not all(each.done for each in urgent):
            break
    assert [("patient", 1) in shares for shares in fed] == [False] * scheduler.PATIENCE + [True]


def test_who_cannot_be_packed_is_fed_alone(fed: list[Shares]) -> None:
    """Each gets a forward, in turn."""
    wants = [want(name, alone=True) for name in "abc"]
    made = submitted(*wants)
    for each in wants:
        made.step(each)
    while not all(each.done for each in wants):
        made.left(fed[-1][0][0])
        made.step(next(each for each in wants if not each.done))
    assert fed == [[("a", 1)], [("b", 1)], [("c", 1)]]


def test_only_turns_in_the_same_state_of_torch_share_a_forward(fed: list[Shares]) -> None:
    """One that runs under autocast feeds those that do, too."""
    plain, cast = want("plain", ambient=("off",)), [want("cast", ambient=("on",)), want("cast, too", ambient=("on",))]
    made = submitted(plain, *cast)
    made.step(cast[0])
    assert fed == [[("cast", 1), ("cast, too", 1)]]
    assert not plain.done


def test_turns_that_were_fed_last_are_waited_for(fed: list[Shares], monkeypatch: pytest.MonkeyPatch) -> None:
    """Until all have come, or one has left, or nobody came for a moment."""
    now = [0.0]
    monkeypatch.setattr(scheduler.time, "monotonic", lambda: now[0])
    first = [want("a"), want("b"), want("c")]
    made = submitted(*first)
    made.step(first[0])
    second = want("a")
    made.submit(second)
    assert made.pause() == scheduler.LINGER
    made.step(second)
    assert not second.done
    made.submit(want("b"))
    assert made.pause() > 0
    made.left("c")
    assert made.pause() == 0
    made.step(second)
    assert fed[-1] == [("a", 1), ("b", 1)]
    slow = want("a")
    made.submit(slow)
    now[0] += scheduler.LINGER
    made.step(slow)
    assert fed[-1] == [("a", 1)]


def test_turns_that_have_begun_are_waited_for(fed: list[Shares], monkeypatch: pytest.MonkeyPatch) -> None:
    """For a moment, until they come or leave; those that begin while others are fed, too."""
    now = [0.0]
    monkeypatch.setattr(scheduler.time, "monotonic", lambda: now[0])
    made, first = Scheduler(), want("a")
    made.expect("a")
    made.expect("b")
    made.submit(first)
    assert made.pause() == scheduler.LINGER
    now[0] += scheduler.LINGER
    made.step(first)
    assert fed == [[("a", 1)]]
    made.left("a")
    assert made.pause() == 0  # b, which did not come, is not waited for again


def test_what_is_withdrawn_is_not_fed(fed: list[Shares]) -> None:
    """The others are; withdrawing twice does nothing."""
    wants = [want("a"), want("b")]
    made = submitted(*wants)
    made.withdraw(wants[0])
    made.withdraw(wants[0])
    made.step(wants[1])
    assert fed == [[("b", 1)]]


def test_an_interrupted_forward_leaves_the_others_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who was fed before the interrupt keeps the outcome and is not fed again."""
    wants = [want("a"), want("b")]
    made = submitted(*wants)

    def feed(shares: Sequence[tuple[Want, int]]) -> None:
        shares[0][0].outcome = Outcome(1)
        raise KeyboardInterrupt

    monkeypatch.setattr(scheduler, "feed", feed)
    with pytest.raises(KeyboardInterrupt):
        made.step(wants[1])
    again: list[Any] = []
    monkeypatch.setattr(scheduler, "feed", again.extend)
    made.left("a")
    made.step(wants[1])
    assert again == [(wants[1], 1)]


def test_threads_that_wait_are_fed_together(fed: list[Shares]) -> None:
    """While one thread computes, others come; the next forward feeds all of them."""
    made, names = Scheduler(), ("a", "b", "c", "d")
    threads = [threading.Thread(target=made.serve, args=(want(name),)) for name in names]
    with made.lock:
        for thread in threads:
            thread.start()
        waiting: Callable[[], int] = lambda: len(made._waiting)  # noqa: E731
        while waiting() < len(names):
            threading.Event().wait(0.001)
    for thread in threads:
        thread.join()
    assert [sorted(shares) for shares in fed] == [[(name, 1) for name in names]]
