"""Snapshots of sessions: they go on as if they had never stopped, under the shares that can hold them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from agentmem import plugins
from agentmem.errors import AgentmemError, RuntimeBusy, SettingsRefused, SnapshotRefused
from agentmem.sessions import Runtime, Session
from agentmem.sessions.conversation import Interrupted
from support import tiny_chat
from support.matrices import in_turn

GEMMA = tiny_chat.model("gemma3_text", layers=2)
FEW = tiny_chat.model(max_position_embeddings=160)
KINDS: dict[str, dict[str, Any]] = {
    "replay": {},
    "live": {"policy": "am-halving[probe=live,probe_tokens=24]"},
    "context and random": {"policy": "am-halving[probe=context+random,probe_tokens=24]"},
    "scores": {"policy": "heavy-hitters"},
    "random subset": {"policy": "random-subset"},
    "never compacted": {"policy": "full"},
    "unequal heads": {"policy": "head-roles"},
    "sliding windows": {"on": GEMMA},
    "re-based": {"on": FEW, "rebase": True},
    "bfloat16": {"on": tiny_chat.model(dtype=torch.bfloat16)},
}
ROOM = 3.2
"""Leases of the runtimes here; the one for what is never compacted has room for all."""


def opened(kind: str, **options: Any) -> Runtime:
    """A runtime with room for three sessions of a kind."""
    slots = {"slots": 400} if kind == "never compacted" else {}
    return tiny_chat.runtime(ROOM, **KINDS[kind], **slots, **options)


def turn(session: Session, text: str, count: int = 8, **options: Any) -> None:
    """A message and a reply."""
    session.append("user", text)
    session.generate(max_new_tokens=count, **options)


def state_of(session: Session) -> dict[str, Any]:
    """What a caller can see of a session."""
    hidden = {"name", "charged_bytes", "peak_bytes", "state"}
    stats = session.stats.model_dump(exclude=hidden)
    return {"stats": stats, "transcript": session.transcript, "dialogue": session.dialogue}


@in_turn(kind=list(KINDS), sampled=[False, True])
def test_a_loaded_session_goes_on_as_if_it_had_never_stopped(kind: str, sampled: bool, tmp_path: Path) -> None:
    """Saved in mid-dialogue with an open reply, loaded by another runtime: the same tokens, slots and reports."""
    options = {"do_sample": sampled}
    with opened(kind) as made:
        session = made.session(seed=3, name="ann")
        session.append("system", "be kind")
        turn(session, "a long way to go " * 4, **options)
        session.append("user", "and " * 12)
        session.generate(max_new_tokens=5, keep_open=True, **options)
        session.save(tmp_path)
        with opened(kind) as other:
            loaded = other.load(tmp_path)
            assert state_of(loaded) == state_of(session)
            assert loaded.memory.report().compactions == session.memory.report().compactions
            for each in (session, loaded):
                each.generate(max_new_tokens=9, keep_open=True, **options)
                turn(each, "on and on " * 5, **options)
            assert state_of(loaded) == state_of(session)
            assert tiny_chat.same(tiny_chat.slots(loaded), tiny_chat.slots(session))
            assert bool(session.stats.compactions) == (kind != "never compacted")
            assert bool(session.stats.rebases) == (kind == "re-based")
            tiny_chat.audit(other)


@pytest.mark.parametrize("kind", KINDS)
def test_trim_disk_and_coming_back_lose_nothing(kind: str) -> None:
    """However often a session is preempted between turns, its tokens and slots are those of one that never did."""
    with opened(kind, pressure=("trim", "disk")) as made:
        session, twin = (tiny_chat.filled(made, 40, name=name) for name in ("away", "here"))
        for round_, stage in enumerate(("trim", "disk", "trim", "disk")):
            charged = session.stats.charged_bytes
            with made.scheduler.lock:
                session.holding.preempt(stage, made.folder)  # type: ignore[arg-type]
            assert session.stats.charged_bytes < charged
            assert session.stats.state == ("on disk" if stage == "disk" else "idle")
            for each in (session, twin):
                each.read(tiny_chat.ids(17, round_))
            assert tiny_chat.on(session, 6) == tiny_chat.on(twin, 6)
            assert state_of(session) == state_of(twin)
            tiny_chat.audit(made)
        assert tiny_chat.same(tiny_chat.slots(session), tiny_chat.slots(twin))
        assert list(made.folder().glob("idle-*")) == []


def test_an_unread_message_is_saved_with_its_pins(tmp_path: Path) -> None:
    """A session whose reading was cancelled is saved with what is pending, pinned tokens among it."""
    with tiny_chat.runtime(3) as made:
        session, twin = made.session(), made.session()
        reading = session.appending([{"role": "system", "content": "be kind"}], deadline=0.0)
        assert [event.type for event in reading] == ["turn_finished"]
        twin.append("system", "be kind")
        session.save(tmp_path)
        loaded = made.load(tmp_path)

        assert loaded.stats.pending == len(session.ids) > 10
        for each in (session, loaded, twin):
            turn(each, "a long way to go " * 4, do_sample=False)
        assert list(loaded.ids) == list(session.ids) == list(twin.ids)
        assert loaded.stats.pinned_tokens == twin.stats.pinned_tokens > 10


def test_an_interrupted_compaction_is_finished_by_a_save(tmp_path: Path) -> None:
    """What is saved never has a compaction half done; the hook is told of the one that saving ended."""
    told: list[Any] = []
    with tiny_chat.runtime(3) as made:
        session, twin = tiny_chat.filled(made, after_compact=told.append), tiny_chat.filled(made)

        def stop() -> None:
            raise Interrupted("cancelled")

        session.runtime.admit(session, stop)
        session.memory.boundary = stop
        with pytest.raises(Interrupted):
            session.engine.compact(session.memory.sequences[0])
        made.end(session, stop)
        told.clear()
        session.save(tmp_path)
        twin.compact()

        assert len(told) == 1
        assert tiny_chat.on(made.load(tmp_path)) == tiny_chat.on(twin) == tiny_chat.on(session)


# ---- shares and settings


@pytest.mark.parametrize("kind", ["replay", "live", "sliding windows"])
def test_a_larger_share_gives_more_room(kind: str, tmp_path: Path) -> None:
    """Under a larger share the same slots have more room; the next tokens are those that they were."""
    with opened(kind) as made:
        session = tiny_chat.filled(made, 100)
        session.save(tmp_path)
        share = tiny_chat.lease(KINDS[kind].get("policy", "am-halving"), KINDS[kind].get("on"), 128)
        loaded = made.load(tmp_path, share=share)

        assert loaded.stats.capacity >= 128
        assert loaded.stats.room > session.stats.room
        assert tiny_chat.on(loaded, 6) == tiny_chat.on(session, 6)
        loaded.read(tiny_chat.ids(200))
        assert loaded.stats.compactions > session.stats.compactions - 1
        tiny_chat.audit(made)


def test_stored_queries_fit_the_share_that_a_session_is_loaded_with(tmp_path: Path) -> None:
    """A smaller share keeps the newest stored queries, a larger one no more than there were: none is made up."""
    for probe in ("live", "context"):
        policy = f"am-halving[probe={probe}]"
        shares = {slots: tiny_chat.lease(policy, slots=slots) for slots in (64, 256, 512)}
        with tiny_chat.runtime(40, policy) as made:
            session = tiny_chat.filled(made, 210, share=shares[256], target=0.25)
            session.compact(target=8)
            session.save(tmp_path / probe)
            sample = session.memory.sequences[0].samples[0][0]
            seen = session.memory.sequences[0].seen
            for slots in (64, 512):
                loaded = made.load(tmp_path / probe, share=shares[slots])
                found = loaded.memory.sequences[0].samples[0][0]
                assert (found.size < sample.size) == (slots == 64)
                kept = dict(zip(sample.tokens(seen).tolist(), sample.kept.unbind(1), strict=True))
                for token, query in zip(found.tokens(seen).tolist(), found.kept.unbind(1), strict=True):
                    assert torch.equal(query, kept[token])
                loaded.read(tiny_chat.ids(90))
                assert torch.isfinite(found.kept).all()
                tiny_chat.audit(made)


def test_a_share_that_is_too_small_is_refused(tmp_path: Path) -> None:
    """More slots than a share has room for, or pins that leave none, are refused with the numbers."""
    with tiny_chat.runtime(3) as made:
        session = tiny_chat.filled(made, 60)
        session.save(tmp_path)
        small = tiny_chat.lease(slots=40)
        with pytest.raises(SnapshotRefused, match=r"needs \d+ bytes|holds 59 slots"):
            made.load(tmp_path, share=small)
        with pytest.raises(SnapshotRefused, match="too small"):
            made.load(tmp_path, share=1000)
        session.compact(target=4)
        session.save(tmp_path)
        loaded = made.load(tmp_path, share=small)
        assert loaded.stats.capacity == 40
        assert tiny_chat.on(loaded, 30)
        assert len(made.sessions) == 2


def test_windows_that_were_compacted_cannot_be_kept_again(tmp_path: Path) -> None:
    """A longer prefix or recent window than what is left is refused; shorter ones, and a new seed, are taken."""
    with tiny_chat.runtime(3, seed=1) as made:
        session = tiny_chat.filled(made, 100)
        session.compact()
        session.save(tmp_path)
        for settings in ({"keep_first": 6}, {"keep_recent": 12}):
            with pytest.raises(SnapshotRefused, match="compacted"):
                made.load(tmp_path, **settings, share=tiny_chat.lease(slots=96))
        loaded = made.load(tmp_path, keep_first=2, keep_recent=6, seed=7)
        again = made.load(tmp_path, keep_first=2, keep_recent=6, seed=7)
        drawn = [tiny_chat.on(each, 12, do_sample=True) for each in (loaded, again, made.load(tmp_path), session)]
        assert drawn[0] == drawn[1] != drawn[2] == drawn[3]
        with pytest.raises(SettingsRefused, match="keep_recent"):
            made.load(tmp_path, keep_recent=-1)


@pytest.mark.parametrize("first", [0, 2, 6, 8])
def test_pins_are_kept_behind_another_prefix(first: int, tmp_path: Path) -> None:
    """A session with pins at its front is loaded with a shorter or a longer prefix: they stay, and only they."""
    with tiny_chat.runtime(3, "window") as made:
        session = made.session()
        session.read(tiny_chat.ids(4))
        session.read(tiny_chat.ids(4, 1), pin=True)
        session.read(tiny_chat.ids(90, 2))
        assert session.stats.compactions
        session.save(tmp_path)
        loaded = made.load(tmp_path, keep_first=first)
        loaded.read(tiny_chat.ids(90, 3))
        wanted = [*range(first), *range(max(first, 4), 8)]
        for store in loaded.memory.sequences[0].stores:
            assert store is not None
            assert store.segment(0, 0, 0).positions[: len(wanted)].tolist() == wanted


# ---- what is saved with it


def test_a_long_past_needs_no_longer_share(tmp_path: Path) -> None:
    """Ids are outside the cap: a session with more bytes of ids than its share comes back, from disk and from files."""
    with tiny_chat.runtime(2.5, "window", tiny_chat.model(layers=1), pressure=("disk",), slots=32) as made:
        count = int(made.cap / 2.5) // 8 + 100
        session = tiny_chat.filled(made, count)
        assert session.stats.lease_bytes < 8 * count
        session.save(tmp_path)
        others = [tiny_chat.filled(made, 5), tiny_chat.filled(made, 5)]
        assert session.stats.state == "on disk"
        others.pop().close()

        assert tiny_chat.on(made.load(tmp_path), 4) == tiny_chat.on(session, 4)


def test_reports_with_infinite_numbers_are_saved(tmp_path: Path) -> None:
    """The condition of a singular fit is infinite; the report comes back as it was."""
    with tiny_chat.runtime(2) as made:
        session = tiny_chat.filled(made)
        report = session.memory.compactions[-1]
        layers = (report.layers[0].model_copy(update={"condition": float("inf")}), *report.layers[1:])
        session.memory.compactions[-1] = report.model_copy(update={"layers": layers})
        session.save(tmp_path)

        assert made.load(tmp_path).memory.compactions == session.memory.compactions


def test_policies_that_have_no_name_are_given_again(tmp_path: Path) -> None:
    """A policy that its name would not bring back is refused without it, and taken with it."""
    policy = plugins.policy("am-halving", probe="live", probe_tokens=24)
    assert policy.name == "am-halving"
    with tiny_chat.runtime(3, policy) as made:
        session = made.session(policy, extra_policies=[replace(plugins.policy("window"), name="mine")])
        session.read(tiny_chat.ids(90))
        session.save(tmp_path)
        for given in ({}, {"policy": policy}, {"extra_policies": ["window"]}):
            with pytest.raises(SnapshotRefused, match="give it again"):
                made.load(tmp_path, **given)
        loaded = made.load(tmp_path, policy=policy, extra_policies=["window"])
        assert loaded.stats.capacity == session.stats.capacity
        assert tiny_chat.on(loaded) == tiny_chat.on(session)


def test_a_policy_that_has_looked_up_its_table_is_still_the_one_of_its_name(default_model: Any, tmp_path: Path) -> None:
    """What a policy finds out when it is used does not make it another: a new session is loaded by its name."""
    with Runtime(*default_model, cap="48MiB", policy="am-recall", share=0.5) as made:
        session = made.session(extra_policies=["am-calibrated"])
        session.save(tmp_path)
        session.fork().save(tmp_path)
        loaded = made.load(tmp_path)
        assert loaded.memory.policy.name == "am-recall"
        assert loaded.stats.capacity == session.stats.capacity
        assert (loaded.stats.tokens, loaded.stats.total_slots) == (0, 0)


def test_tools_and_template_options_are_given_again(tmp_path: Path) -> None:
    """What the chat template was given besides messages must be the same, since the memory holds its text."""
    template = "{{ note }}{% for tool in tools or [] %}{{ tool.function.name }}{% endfor %}"
    speaks = tiny_chat.tokenizer(template + tiny_chat.tokenizer().chat_template)
    tool = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
    given: dict[str, Any] = {"tools": [tool], "template_options": {"note": "hello"}}
    with Runtime(tiny_chat.model(), speaks, cap=3 * tiny_chat.lease(), **tiny_chat.SETTINGS, share=0.33) as made:
        session = made.session(**given)
        session.append("user", "go on")
        session.save(tmp_path)
        for less in ({}, {"tools": [tool]}, {"template_options": {"note": "hello"}}):
            with pytest.raises(SnapshotRefused, match="give the same"):
                made.load(tmp_path, **less)
        assert list(made.load(tmp_path, **given).ids) == list(session.ids)


def test_hooks_are_given_again(tmp_path: Path) -> None:
    """Hooks are no part of a snapshot; those given to ``load`` are asked and told."""
    told: list[Any] = []
    with tiny_chat.runtime(2) as made:
        tiny_chat.filled(made, 60).save(tmp_path)

        def ask(_: object) -> str:
            told.append("asked")
            return "proceed"

        loaded = made.load(tmp_path, before_compact=ask, after_compact=told.append)
        loaded.read(tiny_chat.ids(30))
        assert told[0] == "asked"
        assert len(told) > 1


def test_a_place_that_cannot_be_written_leaves_the_session(tmp_path: Path) -> None:
    """A save that fails says so and changes nothing; so does one without room to bring the memory back."""
    (tmp_path / "file").write_text("no folder")
    with tiny_chat.runtime(1, pressure=("disk",)) as made:
        session = tiny_chat.filled(made)
        with pytest.raises(AgentmemError, match="file"):
            session.save(tmp_path / "file")
        session.save(tmp_path / "good")
        other = tiny_chat.filled(made, 20)
        turn = other.stream(max_new_tokens=3)
        next(turn)
        with pytest.raises(RuntimeBusy, match="in mid-turn"):
            session.save(tmp_path / "good")
        with pytest.raises(RuntimeBusy, match="in mid-turn"):
            made.load(tmp_path / "good")
        turn.close()  # type: ignore[attr-defined]  # a generator
        assert tiny_chat.on(session) == tiny_chat.on(made.load(tmp_path / "good"))


@pytest.mark.parametrize("way", ["save", "disk"])
def test_what_could_not_be_loaded_again_is_not_written(way: str, tmp_path: Path) -> None:
    """An infinite number in the memory is told when it is saved or moved to disk; the session goes on as it was."""
    with tiny_chat.runtime(1.5, "window", pressure=("disk",), spill=tmp_path / "spill") as made:
        session = tiny_chat.filled(made, 30)
        store = session.memory.sequences[0].stores[0]
        assert store is not None
        store.values[7, 0] = float("inf")
        other = made.session()
        write = {"save": lambda: session.save(tmp_path / "saved"), "disk": lambda: other.read(tiny_chat.ids(20))}[way]
        with pytest.raises(AgentmemError, match=r"not finite.*stays") as refused:
            write()
        assert isinstance(refused.value, RuntimeBusy) == (way == "disk")
        assert "spill" not in str(refused.value)
        assert not (tmp_path / "saved").exists()
        assert not list(tmp_path.rglob("idle-*"))
        assert session.stats.state == "idle"
        assert session.stats.tokens == 30
        tiny_chat.audit(made)


def test_others_give_way_for_a_memory_that_cannot(tmp_path: Path) -> None:
    """A memory that cannot go to disk is passed over: the next idle one goes, and who asks has its turn."""
    with tiny_chat.runtime(2.2, "window", pressure=("disk",), spill=tmp_path) as made:
        stuck, other = tiny_chat.filled(made, 30), tiny_chat.filled(made, 30)
        store = stuck.memory.sequences[0].stores[0]
        assert store is not None
        store.values[7, 0] = float("nan")

        assert tiny_chat.filled(made, 20).stats.tokens == 20
        assert (stuck.stats.state, other.stats.state) == ("idle", "on disk")
        tiny_chat.audit(made)


def test_a_session_under_autocast_is_told_why_it_is_not_saved(tmp_path: Path) -> None:
    """The refusal names both dtypes and what helps; the session goes on."""
    with tiny_chat.runtime(1) as made, torch.autocast("cpu", torch.bfloat16):
        session = tiny_chat.filled(made, 30)
        with pytest.raises(
            AgentmemError,
            match=r"its keys and values are bfloat16, as under torch.autocast, and the model is float32.*"
            r"load the model in bfloat16, or run the session without autocast",
        ):
            session.save(tmp_path)
        assert list(tmp_path.iterdir()) == []
        assert len(tiny_chat.on(session, 2)) == 2


def _another_dtype(session: Session, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(type(session.runtime.model), "dtype", torch.bfloat16)


def _an_entry_too_many(session: Session, _: pytest.MonkeyPatch) -> None:
    session.entries.append(session.entries[0].model_copy(update={"stop": 999}))


def _a_pending_id_too_large(session: Session, _: pytest.MonkeyPatch) -> None:
    session.ids.append(4000)


@pytest.mark.parametrize(
    ("break_it", "said"),
    [
        (_another_dtype, "dtype was float32 .* is bfloat16, weights .*float32 now"),
        (_an_entry_too_many, r"tokens 0\.\.999 of 30"),
        (_a_pending_id_too_large, r"ids \[4000\] are pending"),
    ],
)
def test_a_session_is_checked_like_a_snapshot_before_it_is_written(
    break_it: Any, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What loading would refuse is refused by saving, and nothing is written."""
    with tiny_chat.runtime(1, on=tiny_chat.model(seed=9)) as made:
        session = tiny_chat.filled(made, 30)
        break_it(session, monkeypatch)
        with pytest.raises(AgentmemError, match=f"cannot be saved.*{said}"):
            session.save(tmp_path)
        assert list(tmp_path.iterdir()) == []
