"""The newest request is pinned until it is answered, where it fits; below the cap nothing changes."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from agentmem.errors import CapTooSmall, SettingsRefused, UnsupportedGeneration
from agentmem.memory.store import LayerStore
from agentmem.sessions import Session
from agentmem.sessions.transcript import Entry
from support import talk, tiny_chat

QUESTION = "What is the capital of France?"
WIDE: dict[str, Any] = talk.ROOMY | {"max_slots": 160}
"""80 slots per head after a compaction: 4 of the prefix, 8 recent, 68 between, of which a request may take 17."""
MOST = 17


@contextmanager
def begun(policy: str = "window", **settings: Any) -> Iterator[Session]:
    """A conversation whose newest request has just been read, behind some others."""
    with talk.session(policy=policy, **(WIDE | {"pin_roles": ()} | settings)) as session:
        session.append("user", "One two three.")
        talk.greedy(session, 3)
        session.append("user", QUESTION)
        yield session


def request(session: Session) -> Entry:
    """The newest message of a user's."""
    return [entry for entry in session.transcript.entries if entry.role == "user"][-1]


def kept(session: Session, entry: Entry) -> bool:
    """Whether every head of every layer has a slot for each token of an entry, as it was appended."""
    row = session.memory.sequences[0]
    held = [store.promoted for _, store in row.full()]
    newer = max(row.intact, entry.start)
    behind = {(entry.start, min(newer, entry.stop))} if entry.start < newer else set()
    return all(any(low <= start and stop <= high for low, high in each) for start, stop in behind for each in held)


def write(session: Session, tokens: int, **options: Any) -> None:
    """A reply of so many tokens."""
    session.generate(**talk.dictate([session.ids[3]] * tokens, **options))


@pytest.mark.parametrize("policy", ["window", "am-halving", "heavy-hitters"])
def test_the_newest_request_stays_until_it_is_answered(policy: str) -> None:
    """Through the compactions of one long reply its slots are whole; afterwards they are compacted like the rest."""
    with begun(policy) as session:
        entry = request(session)
        assert 8 < entry.stop - entry.start <= MOST
        assert session.stats.request_tokens == entry.stop - entry.start
        before = session.stats.compactions
        write(session, 260)
        assert session.stats.compactions >= before + 2
        assert kept(session, entry)
        assert session.stats.request_tokens == 0
        assert session.stats.pinned_tokens == 0
        session.compact(target=8)
        assert session.memory.sequences[0].promoted == ()
        assert not kept(session, entry)


def test_it_is_an_option() -> None:
    """Without it nothing is pinned, and the request is compacted while its reply is written."""
    with begun(pin_request=False) as session:
        entry = request(session)
        assert session.stats.request_tokens == 0
        write(session, 260)
        assert not kept(session, entry)
        assert session.memory.sequences[0].promoted == ()


def test_below_the_cap_nothing_changes() -> None:
    """The tokens are stock's, no store is rearranged and no random state is touched."""
    with talk.session(**talk.ROOMY) as session:
        session.append("user", QUESTION)
        session.say("It is")
        assert session.stats.request_tokens > 0
        wanted, state = talk.stock(session, 12), torch.get_rng_state()
        before = len(session.ids)
        talk.greedy(session, 12)
        assert list(session.ids[before:]) == wanted
        assert torch.equal(torch.get_rng_state(), state)
        assert session.stats.request_tokens == 0


def test_a_request_that_stays_in_the_recent_window_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """No store is rearranged for requests that are answered before they leave it, compactions or not."""
    monkeypatch.setattr(LayerStore, "reordered", None)
    with begun(keep_recent=40, max_slots=256) as session:
        while session.stats.compactions < 3:
            session.append("user", QUESTION)
            assert session.stats.request_tokens > 0
            write(session, 8)


def test_a_request_that_does_not_fit_is_not_pinned(caplog: pytest.LogCaptureFixture) -> None:
    """The turn goes on without, and a log event says how long it is and how long it might be."""
    caplog.set_level(logging.INFO, logger="agentmem")
    with talk.session(**WIDE, pin_roles=()) as session:
        session.append("user", QUESTION * 3)
        assert session.stats.request_tokens == 0
        assert not [each for each in caplog.records if each.message == "request_not_pinned"]
        write(session, 12)
        (record,) = [each for each in caplog.records if each.message == "request_not_pinned"]
        entry = request(session)
        assert record.__dict__["tokens"] == entry.stop - entry.start
        assert record.__dict__["most"] == MOST
        assert record.__dict__["session"] == session.name
        session.append("user", QUESTION)
        assert session.stats.request_tokens > 0


def test_only_what_is_still_whole_is_pinned() -> None:
    """A request that a compaction has reached before its reply is not: what is left of it is no request."""
    with begun() as session:
        session.unpin(0, len(session.ids))
        assert session.stats.request_tokens == 0
        session.read(talk.ids("one two three four five six") * 20)
        assert session.stats.compactions
        write(session, 8)
        assert session.memory.sequences[0].promoted == ()


def test_what_is_read_before_the_reply_leaves_it_whole() -> None:
    """Tool results and texts behind the request may compact the memory; the request stays, and so it does later on."""
    with begun() as session:
        entry = request(session)
        session.append("tool", "one two three four five six " * 30)
        session.read(talk.ids("one two three four five six") * 20)
        assert session.stats.compactions >= 2
        assert kept(session, entry)
        assert session.stats.request_tokens > 0


def test_a_request_is_pinned_again_while_its_tools_are_read() -> None:
    """A reply may be a call of a tool: what it is called for was unpinned with it, and is pinned again as it is."""
    with begun() as session:
        entry = request(session)
        write(session, 170)
        assert session.memory.sequences[0].promoted == ((entry.start, entry.stop),)
        assert session.stats.request_tokens == 0
        session.append("tool", "4217 " * 40)
        assert session.stats.request_tokens == entry.stop - entry.start
        write(session, 170)
        assert kept(session, entry)
        session.append("user", QUESTION)
        assert session.memory.sequences[0].pins.request[0][0] >= entry.stop


def test_messages_of_a_user_in_a_row_are_one_request() -> None:
    """As long as they fit together; then the newest alone."""
    with talk.session(**WIDE, pin_roles=()) as session:
        session.append("system", "You are terse.")
        session.append("user", "No.")
        session.append("user", "Yes.")
        first, second = [entry for entry in session.transcript.entries if entry.role == "user"][-2:]
        assert session.memory.sequences[0].pins.request == ((first.start, second.stop),)
        session.append("user", QUESTION)
        newest = request(session)
        assert session.memory.sequences[0].pins.request == ((newest.start, newest.stop),)


def test_a_compaction_by_hand_leaves_the_request_like_other_pins() -> None:
    """Before the reply it takes everything else, afterwards the request, too."""
    with begun() as session:
        entry = request(session)
        assert session.compact(target=4) is not None
        session.append("tool", "4217")
        session.compact(target=1)
        assert kept(session, entry)
        assert session.memory.sequences[0].promoted == ((entry.start, entry.stop),)
        write(session, 4)
        assert session.compact(target=1) is not None
        assert not kept(session, entry)


def test_what_is_to_be_compacted_at_once_is_not_pinned() -> None:
    """``compact="after"`` asks for the opposite; a tool's result that is compacted leaves the request pinned."""
    with begun(policy="am-halving") as session:
        entry = request(session)
        session.append("tool", "one two three four five six " * 8, compact="after")
        assert session.stats.compactions
        assert session.stats.request_tokens == entry.stop - entry.start
        assert kept(session, entry)
        session.append("user", QUESTION, compact="after")
        assert session.stats.request_tokens == 0


def test_pins_come_before_the_request() -> None:
    """What a caller pins is refused no sooner than without the option; the request makes room for it."""
    lengths = []
    for option in (True, False):
        with begun(pin_roles=("assistant",), pin_request=option) as session:
            with pytest.raises(CapTooSmall, match="pinned tokens"):
                write(session, 100)
            lengths.append(len(session.last.ids))
            assert session.stats.request_tokens == 0
    assert lengths[0] == lengths[1] > 40
    with begun() as session:
        entry = request(session)
        session.pin(entry.start, entry.start + 3)
        write(session, 8)
        assert session.memory.sequences[0].pins.all == ((entry.start, entry.start + 3),)


def test_a_reply_that_goes_on_keeps_the_request() -> None:
    """Kept open, cancelled before its first token or refused: the request is pinned until the reply is closed."""
    with begun() as session:
        entry = request(session)
        with pytest.raises(UnsupportedGeneration):
            session.generate(num_beams=2)
        session.generate(max_new_tokens=4, deadline=1e-9)
        assert session.reply is not None
        session.say("It is")
        write(session, 100, keep_open=True)
        session.compact(target=8)
        assert session.stats.request_tokens == entry.stop - entry.start
        assert kept(session, entry)
        write(session, 100)
        assert session.stats.request_tokens == 0
        assert kept(session, entry)


@pytest.mark.parametrize("way", ["fork", "disk", "file"])
def test_a_session_in_the_middle_of_a_reply_is_forked_moved_and_saved(way: str, tmp_path: Path) -> None:
    """With its request: it goes on as one that stayed."""
    with tiny_chat.runtime(3.2, slots=160, pressure=("trim", "disk")) as made:
        session, twin = made.session(), made.session()
        for each in (session, twin):
            each.read(tiny_chat.ids(60))
            each.append("user", "ab")
            tiny_chat.on(each, 120, min_new_tokens=120)
            assert each.stats.compactions
            assert each.stats.request_tokens > 2
        if way == "fork":
            session = session.fork()
        elif way == "file":
            session.save(tmp_path)
            session = made.load(tmp_path)
        else:
            with made.scheduler.lock:
                session.holding.preempt("disk", made.folder)
            assert session.stats.request_tokens == twin.stats.request_tokens
        for each in (session, twin):
            tiny_chat.on(each, 90, min_new_tokens=90)
            each.append("user", "c")
            each.read(tiny_chat.ids(90))
        assert list(session.ids) == list(twin.ids)
        assert session.memory.sequences[0].pins == twin.memory.sequences[0].pins
        assert tiny_chat.same(tiny_chat.slots(session), tiny_chat.slots(twin))


def test_a_request_is_given_up_where_a_loaded_session_has_no_room_for_it(tmp_path: Path) -> None:
    """Under a smaller share, or without the option, it is loaded unpinned; other pins would be refused."""
    with tiny_chat.runtime(3, slots=160) as made:
        session = made.session()
        session.append("user", "ab")
        session.read(tiny_chat.ids(10))
        session.compact(target=4)
        session.save(tmp_path)
        for options in ({}, {"pin_request": False}, {"share": tiny_chat.lease(slots=48)}):
            loaded = made.load(tmp_path, **options)
            assert bool(loaded.stats.request_tokens) == (options == {})
            assert tiny_chat.on(loaded, 60)
            loaded.close()


def test_the_setting_is_a_bool() -> None:
    """Anything else is refused by its name."""
    with pytest.raises(SettingsRefused, match="pin_request"):
        talk.runtime().session(pin_request="perhaps")
