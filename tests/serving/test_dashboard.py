"""The dashboard: a page that needs no key and says nothing, and numbers of the conversations of one key."""

from __future__ import annotations

import itertools
import json
import re
import time
from pathlib import Path
from typing import Any

import httpx2
import pytest

from agentmem.serving.dashboard import life, route, watch
from agentmem.serving.dashboard.life import Life
from agentmem.serving.recipes import Recipe
from support import serving, tiny_chat

CHAT = "/v1/chat/completions"
ALICE, BOB = serving.KEYS


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every state is made anew."""
    monkeypatch.setattr(watch, "PAUSE", 0.0)


async def state(http: httpx2.AsyncClient, key: str | None = None) -> dict[str, Any]:
    """What the page would show."""
    answer = await http.get(route.STATE, headers={} if key is None else {"Authorization": f"Bearer {key}"})
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


async def test_the_page_needs_no_key_and_loads_nothing_from_elsewhere() -> None:
    """Every address in it is this server's, its policy allows no other, and it is the same for everyone."""
    async with serving.client(serving.server(keys=serving.KEYS)) as http:
        pages = {path: await http.get(path) for path in sorted(route.OPEN)}
        assert "/" in pages
        for answer in pages.values():
            assert answer.status_code == 200
            assert "default-src 'none'" in answer.headers["content-security-policy"]
            assert "unsafe" not in answer.headers["content-security-policy"]
            assert answer.headers["x-content-type-options"] == "nosniff"
            text = answer.text.replace("http://www.w3.org/2000/svg", "")
            assert not re.search(r"https?:|//[a-z]|@import|<script>|style=|\son[a-z]+=|innerHTML|eval\(", text)
        named = set(re.findall(r'(?:href|src|from) ?=?"?"(/[^"]+)"', "".join(each.text for each in pages.values())))
        assert named | {"/"} == set(pages)
        assert 'data-key="yes"' in pages["/"].text
    async with serving.client(serving.server()) as http:
        assert 'data-key="no"' in (await http.get("/")).text


async def test_the_numbers_need_the_key() -> None:
    """No key and a wrong one are refused; a key sees its own conversations alone, whatever the others are called."""
    async with serving.client(serving.server(keys=serving.KEYS)) as http:
        for key in (None, "wrong-key"):
            headers = {} if key is None else {"Authorization": f"Bearer {key}"}
            assert (await http.get(route.STATE, headers=headers)).status_code == 401
        for key, name in ((ALICE, "mine"), (BOB, "his"), (BOB, "another")):
            headers = {"Authorization": f"Bearer {key}", "X-Agentmem-Session": name}
            assert (await http.post(CHAT, json=serving.chat("x" * 80), headers=headers)).status_code == 200
        hers, his = await state(http, ALICE), await state(http, BOB)

    assert [each["id"] for each in hers["conversations"]] == ["mine"]
    assert [each["id"] for each in his["conversations"]] == ["another", "his"]
    assert "his" not in json.dumps(hers["compactions"] + hers["conversations"])
    assert {each["conversation"] for each in hers["compactions"]} <= {"mine"}


async def test_the_numbers_are_what_the_responses_said() -> None:
    """Slots, capacity and compactions of each conversation, bytes by kind, and no word of what was said."""
    of = serving.server(serving.runtime(2, policy="am-halving"))
    async with serving.client(of) as http:
        answer = await http.post(CHAT, json=serving.chat("the colour of my door " * 6))
        found = await state(http)
    facts, usage = answer.json()["agentmem"], answer.json()["usage"]
    (talk,) = found["conversations"]
    assert (talk["id"], talk["state"], talk["capacity"]) == (facts["session"], "idle", facts["capacity"])
    assert usage["total_tokens"] - talk["tokens"] in (0, 1)  # the last one waits to be fed
    assert talk["compactions"] == facts["total_compactions"] == len(found["compactions"]) > 0
    for told, shown in zip(facts["compactions"], found["compactions"], strict=True):
        assert {name: shown[name] for name in told} == told
    runtime = found["runtime"]
    kinds = [runtime[f"{kind}_bytes"] for kind in ("running", "running_room", "idle", "idle_room")]
    assert sum(kinds) == runtime["charged_bytes"] <= runtime["cap_bytes"] == of.runtime.cap
    assert "colour" not in json.dumps(found)
    lengths = {len(values) for values in found["moments"].values()}
    assert len(lengths) == 1
    assert lengths.pop() >= 1


async def test_a_saw_tooth_rises_with_tokens_and_falls_at_compactions() -> None:
    """It begins at nothing, each compaction is a corner above and one below, and it ends where the memory is."""
    of = serving.server(serving.runtime(2, policy="am-halving"))
    async with serving.client(of) as http:
        await http.post(CHAT, json=serving.chat("x" * 150))
        (talk,) = (await state(http))["conversations"]
    points = [tuple(each) for each in talk["saw_tooth"]]
    assert points[0] == (0, 0)
    assert points[-1] == (talk["tokens"], pytest.approx(talk["slots"], abs=0.1))
    assert [tokens for tokens, _ in points] == sorted(tokens for tokens, _ in points)
    falls = [at for at, (one, other) in enumerate(itertools.pairwise(points)) if other[1] < one[1]]
    assert len(falls) == talk["compactions"] > 1
    assert all(points[at][0] == points[at + 1][0] for at in falls)
    assert max(slots for _, slots in points) <= talk["capacity"]


async def test_an_earlier_servers_conversation_is_shown_from_where_it_goes_on(tmp_path: Path) -> None:
    """It is there as kept before it is used; then its line begins where its memory is."""
    told: list[Any] = serving.said("x" * 100)
    for again in (False, True):
        of = serving.server(serving.runtime(2, policy="am-halving"), state=tmp_path)
        async with serving.client(of) as http:
            (kept,) = (await state(http))["conversations"] if again else [None]
            made = await http.post(CHAT, json=serving.chat() | {"messages": told})
            told += [made.json()["choices"][0]["message"], *serving.said("x")]
            (talk,) = (await state(http))["conversations"]
    assert kept is not None
    assert (kept["state"], kept["saw_tooth"]) == ("kept", [])
    assert talk["compactions"] > 0
    assert talk["saw_tooth"][0][0] > 100


async def test_only_so_much_is_kept_and_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """Moments, compactions of a memory, and conversations of a state are bounded."""
    of = serving.server()
    try:
        for _ in range(watch.MOMENTS + 3):
            of.watch.note()
        for at in range(watch.CONVERSATIONS + 3):
            made, _count = of.conversations.claim("local", Recipe(), ["x"], name=f"n{at}")
            made.busy, made.used = False, time.time() + at
        found = json.loads(of.watch.state("local"))
        assert len(found["moments"]["at"]) == watch.MOMENTS
        assert (len(found["conversations"]), found["hidden"]) == (watch.CONVERSATIONS, 3)
        assert "n0" not in {each["id"] for each in found["conversations"]}
        monkeypatch.setattr(watch, "PAUSE", 1e9)
        given = of.watch.state("local")
        of.watch.note()
        assert of.watch.state("local") is given
    finally:
        await of.close()
        of.runtime.close()


def test_a_life_keeps_the_newest_compactions() -> None:
    """Of a memory that was compacted more often, the line begins at the first that is kept."""
    with tiny_chat.runtime(1) as made:
        one = Life()
        session = made.session(after_compact=one.compacted)
        session.read(tiny_chat.ids(200))
        one.look(session)
        (report, *_) = session.memory.compactions
        before = one.saw_tooth()
        for _ in range(life.KEPT):
            one.compacted(report)
        after = one.saw_tooth()
    assert before[0] == (0, 0)
    assert len(after) == 2 * life.KEPT + (after[-1] == (one.tokens, round(one.slots, 2)))
    assert after[0][0] == report.tokens_seen
