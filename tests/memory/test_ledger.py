"""The ledger: R + T never crosses the cap, and what is borrowed is given back."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentmem.errors import MemoryCapExceeded
from agentmem.memory.ledger import Ledger


def test_what_is_held_and_borrowed_adds_up() -> None:
    """R is what was held and not released; T what is borrowed right now; the peak is the most of their sum."""
    ledger = Ledger(100)
    ledger.hold("a", 25, "slots")
    ledger.hold("b", 15, "slots")
    with ledger.borrow(30, "a fit"), ledger.borrow(20, "a check"):
        assert (ledger.resident, ledger.transient) == (40, 50)
    ledger.release("b")
    ledger.release("b")
    assert (ledger.resident, ledger.transient, ledger.peak) == (25, 0, 90)


def test_the_cap_itself_may_be_reached() -> None:
    """R + T = cap is allowed; one byte more is not."""
    ledger = Ledger(100)
    ledger.hold("60", 60, "slots")
    with ledger.borrow(40, "a fit"), pytest.raises(MemoryCapExceeded):
        ledger.hold("1", 1, "slots")


@pytest.mark.parametrize("verb", ["hold", "borrow"])
def test_a_refusal_names_value_limit_and_remedy_and_changes_nothing(verb: str) -> None:
    """The message has the bytes asked for, the bytes there, the cap and what to do."""
    ledger = Ledger(100)
    ledger.hold("60", 60, "slots")
    said = r"a fit needs 41 bytes on top of 60 bytes.*101 bytes of a cap of 100 bytes.*raise"
    with pytest.raises(MemoryCapExceeded, match=said):
        ledger.hold("41", 41, "a fit") if verb == "hold" else ledger.borrow(41, "a fit").__enter__()
    assert (ledger.resident, ledger.transient, ledger.peak) == (60, 0, 60)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_what_is_borrowed_is_given_back_whatever_happens(error: type[BaseException]) -> None:
    """A fault and an interrupt end the loan."""
    ledger = Ledger(100)
    with pytest.raises(error), ledger.borrow(70, "a fit"):
        raise error
    assert ledger.transient == 0


def test_watching_finds_the_peak_of_a_block() -> None:
    """Nested watches see their own peaks; the outer one includes the inner; an earlier peak counts for neither."""
    ledger = Ledger(100)
    with ledger.borrow(90, "before"):
        pass
    ledger.hold("10", 10, "slots")
    with ledger.watch() as outer:
        with ledger.borrow(20, "first"):
            pass
        with ledger.watch() as inner, ledger.borrow(50, "second"):
            pass
        with ledger.watch() as idle:
            pass
    assert (outer, inner, idle) == ([60], [60], [10])


def test_what_is_outside_is_not_counted_as_borrowed() -> None:
    """An oracle may take what it needs; what is held is counted all the same; afterwards all is as before."""
    ledger = Ledger(100)
    ledger.hold("60", 60, "slots")
    with ledger.watch() as peak, ledger.outside(), ledger.borrow(1000, "a fit"):
        ledger.touch(1000, "attention")
        assert (ledger.resident, ledger.transient) == (60, 0)
        ledger.hold("30", 30, "a store")
        with pytest.raises(MemoryCapExceeded):
            ledger.hold("11", 11, "another")
    assert (ledger.resident, ledger.transient, ledger.peak) == (90, 0, 90)
    assert peak == [90]
    with pytest.raises(MemoryCapExceeded):
        ledger.touch(11, "attention")


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_outside_ends_with_its_block(error: type[BaseException]) -> None:
    """A fault does not leave the cap open."""
    ledger = Ledger(100)
    with pytest.raises(error), ledger.outside():
        raise error
    with pytest.raises(MemoryCapExceeded):
        ledger.borrow(101, "a fit").__enter__()


def test_a_loan_that_began_inside_is_given_back_inside() -> None:
    """What was borrowed before a block outside stays borrowed in it."""
    ledger = Ledger(100)
    with ledger.borrow(70, "a fit"):
        with ledger.outside():
            assert ledger.transient == 70
        assert ledger.transient == 70
    assert ledger.transient == 0


@settings(deadline=None, derandomize=True)
@given(
    cap=st.integers(0, 1000),
    counts=st.lists(st.tuples(st.sampled_from(["hold", "release", "borrow"]), st.integers(0, 400)), max_size=30),
)
def test_no_order_of_calls_crosses_the_cap(cap: int, counts: list[tuple[str, int]]) -> None:
    """Whatever is asked for, R + T ≤ peak ≤ cap, and a refusal leaves the account as it was."""
    ledger, held, holders = Ledger(cap), 0, list[tuple[object, int]]()
    for verb, count in counts:
        if verb == "release":
            holder, freed = holders.pop() if holders else (object(), 0)
            ledger.release(holder)
            held -= freed
        elif held + count > cap:
            with pytest.raises(MemoryCapExceeded):
                ledger.hold(object(), count, "slots")
        elif verb == "hold":
            holders.append((object(), count))
            ledger.hold(*holders[-1], "slots")
            held += count
        else:
            with ledger.borrow(count, "a fit"):
                assert (ledger.resident, ledger.transient) == (held, count)
        assert (ledger.resident, ledger.transient) == (held, 0)
        assert held <= ledger.peak <= cap


def test_recovering_leaves_what_the_named_hold() -> None:
    """Loans without an end and entries of nobody are taken back; those who hold something keep it."""
    ledger, kept, lost = Ledger(100), object(), object()
    ledger.hold(kept, 30, "slots")
    ledger.hold(lost, 20, "slots")
    loan, outside = ledger.borrow(40, "a fit"), ledger.outside()
    loan.__enter__()
    outside.__enter__()
    ledger.recover([kept])
    assert (ledger.resident, ledger.transient) == (30, 0)
    with pytest.raises(MemoryCapExceeded):
        ledger.touch(71, "attention")
