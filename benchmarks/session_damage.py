"""Ways to forge the snapshot of a session, by name: all checksums are right, and what they cover is not.

The snapshot that is forged has pins, compactions, stored queries, scores or none, a seed and an open reply.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from agentmem.sessions.snapshots.files import read_manifest, read_snapshot, write_snapshot


@dataclass
class Parts:
    """What a snapshot is made of; a forgery changes it in place."""

    tensors: dict[str, torch.Tensor]
    state: dict[str, Any]
    settings: dict[str, Any]
    identity: dict[str, str]

    @property
    def row(self) -> dict[str, Any]:
        """The row's state."""
        row: dict[str, Any] = self.state["row"]
        return row

    @property
    def session(self) -> dict[str, Any]:
        """The session's state."""
        session: dict[str, Any] = self.state["session"]
        return session

    def head(self, dice: random.Random) -> tuple[int, int]:
        """Some layer and head."""
        index = dice.randrange(len(self.row["layers"]))
        return index, dice.randrange(len(self.row["layers"][index]["lengths"]))


Forgery = Callable[[Parts, random.Random], object]


def taken(url: str | Path) -> Parts:
    """The parts of a snapshot."""
    manifest = read_manifest(url)
    tensors, state = read_snapshot(url, identity=manifest.identity, max_bytes=1 << 40)
    return Parts(tensors, state, dict(manifest.settings), dict(manifest.identity))


def forge(url: str | Path, onto: str | Path, forgery: Forgery, dice: random.Random) -> None:
    """Write a forged copy of a snapshot."""
    parts = taken(url)
    forgery(parts, dice)
    write_snapshot(onto, parts.tensors, parts.state, identity=parts.identity, settings=parts.settings)


# ---- the row


def _count(name: str, *values: Any) -> Forgery:
    """One count of the row, as it must not be."""

    def forgery(parts: Parts, dice: random.Random) -> None:
        value = dice.choice(values)
        parts.row[name] = value(parts.row) if callable(value) else value

    return forgery


def _length(parts: Parts, dice: random.Random) -> None:
    index, head = parts.head(dice)
    lengths = parts.row["layers"][index]["lengths"]
    lengths[head] = dice.choice([lengths[head] + 1, lengths[head] - 1, -1, 10**12, 0, True, 1.5])


def _heads(parts: Parts, dice: random.Random) -> None:
    lengths = parts.row["layers"][dice.randrange(len(parts.row["layers"]))]["lengths"]
    lengths.append(lengths[-1]) if dice.randrange(2) else lengths.pop()


def _cut(parts: Parts, dice: random.Random) -> None:
    """Too few slots, told truly: a head without its recent window."""
    _sized(parts, dice, 3)


def _grown(parts: Parts, dice: random.Random) -> None:
    """More slots than the cap has room for, told truly."""
    _sized(parts, dice, parts.row["tokens"] + dice.choice([0, 1, 5000]))


def _sized(parts: Parts, dice: random.Random, size: int) -> None:
    index, head = parts.head(dice)
    parts.row["layers"][index]["lengths"][head] = size
    for name in ("keys", "values", "bias", "positions", "scores"):
        place = f"layer.{index}.head.{head}.{name}"
        if place in parts.tensors:
            tensor = parts.tensors[place]
            parts.tensors[place] = tensor[torch.arange(size) % len(tensor)]
            if name == "positions":
                parts.tensors[place] = torch.arange(size, dtype=torch.int32)


def _not_finite(parts: Parts, dice: random.Random) -> None:
    names = [name for name, tensor in parts.tensors.items() if tensor.is_floating_point() and tensor.numel()]
    tensor = parts.tensors[dice.choice(names)]
    tensor.view(-1)[dice.randrange(tensor.numel())] = dice.choice([float("nan"), float("inf"), float("-inf")])


def _positions(parts: Parts, dice: random.Random) -> None:
    index, head = parts.head(dice)
    positions = parts.tensors[f"layer.{index}.head.{head}.positions"]
    kind = dice.choice(["reversed", "negative", "beyond", "twice", "later", "earlier"])
    if kind == "reversed":
        parts.tensors[f"layer.{index}.head.{head}.positions"] = positions.flip(0)
    elif kind in {"negative", "beyond"}:
        positions[dice.randrange(len(positions))] = -1 if kind == "negative" else parts.row["next_position"]
    elif kind == "twice":
        positions[len(positions) // 2] = positions[len(positions) // 2 - 1]
    else:
        positions.add_(1 if kind == "later" else -1)


def _pins(name: str) -> Forgery:
    """Tokens that are not there, were compacted or are no spans, as pins or as the request."""

    def forgery(parts: Parts, dice: random.Random) -> None:
        parts.row[name] = dice.choice(_spans(parts))

    return forgery


def _spans(parts: Parts) -> list[Any]:
    tokens = parts.row["tokens"] + len(parts.session["pending"])
    spans = [[[9, 3]], [[3, 3]], [[0, tokens + 1]], [[0, 10], [5, 20]], [[30, 40], [4, 9]], [[-1, 5]], [[0, tokens]]]
    return [*spans, [[1, 2, 3]], [["a", "b"]], None]


def _front(parts: Parts, dice: random.Random) -> None:
    """Tokens that do not stand first: none though pins were compacted around, more than there are, or out of order."""
    (start, stop), tokens = parts.row["front"][0], parts.row["tokens"]
    spans = [[], [[start, stop - 1]], [[start + 1, stop]], [[start, tokens]], [[start, stop], [tokens, tokens + 4]]]
    parts.row["front"] = dice.choice([*spans, [[stop, start]], [[start, stop], [start, stop]], [[start]], None, 3])


def _layers(parts: Parts, dice: random.Random) -> None:
    layers = parts.row["layers"]
    kind = dice.choice(["gone", "null", "all null", "twice"])
    if kind == "gone":
        layers.pop()
    elif kind == "twice":
        layers.append(layers[0])
    else:
        parts.row["layers"] = [None if at == 0 or kind == "all null" else layer for at, layer in enumerate(layers)]


def _samples(parts: Parts, dice: random.Random) -> None:
    layer = parts.row["layers"][dice.randrange(len(parts.row["layers"]))]
    sample = layer["samples"][0]
    changes: list[dict[str, int]] = [{"filled": sample["filled"] + 1}, {"filled": 0}, {"size": 0}, {"size": 3}]
    change = dice.choice([*changes, {"stride": 0}, {"filled": -1}, {"stride": 1 << 40}, None])
    if change is None:
        layer["samples"] = dice.choice([[], [sample, sample]])
    else:
        sample |= change


def _generator(parts: Parts, dice: random.Random) -> None:
    state = parts.tensors["generator"]
    changes = [state[:-1], state.repeat(2), state[:0], torch.full_like(state, 255), torch.zeros_like(state)]
    parts.tensors["generator"] = dice.choice(changes)


def _ids(parts: Parts, dice: random.Random) -> None:
    if dice.randrange(2):
        parts.tensors["ids"][dice.randrange(len(parts.tensors["ids"]))] = dice.choice([-1, 1 << 40, 1 << 20])
    else:
        parts.session["pending"] = [*parts.session["pending"], dice.choice([-1, 1 << 70, 1 << 20, 1.5, "x"])]


def _bias(parts: Parts, dice: random.Random) -> None:
    for layer in parts.row["layers"]:
        layer["biased"] = False
    index, head = parts.head(dice)
    parts.tensors[f"layer.{index}.head.{head}.bias"][0] = 4.0


def _dtype(parts: Parts, dice: random.Random) -> None:
    index, head = parts.head(dice)
    name = f"layer.{index}.head.{head}.{dice.choice(['keys', 'values', 'bias', 'positions'])}"
    tensor = parts.tensors[name]
    parts.tensors[name] = tensor.to(dice.choice([torch.float16, torch.float64, torch.int64]))


def _shape(parts: Parts, dice: random.Random) -> None:
    index, head = parts.head(dice)
    name = f"layer.{index}.head.{head}.{dice.choice(['keys', 'values', 'bias', 'positions'])}"
    parts.tensors[name] = dice.choice([parts.tensors[name][:-1], parts.tensors[name][None], parts.tensors[name][:0]])


def _tensors(parts: Parts, dice: random.Random) -> None:
    if dice.randrange(2):
        del parts.tensors[dice.choice(sorted(parts.tensors))]
    else:
        parts.tensors[dice.choice(["x", "tail", "layer.0.head.9.keys", "layer.99.head.0.keys"])] = torch.zeros(3)


def _reports(parts: Parts, dice: random.Random) -> None:
    name = dice.choice(["compaction_reports", "rebase_reports"])
    parts.row[name] = dice.choice([[{}], [{"row": 0}], None, {}, [[]], "x"])


def _missing(parts: Parts, dice: random.Random) -> None:
    where = dice.choice([parts.state, parts.row, parts.session])
    if dice.randrange(2):
        del where[dice.choice(sorted(where))]
    else:
        where["extra" if where is not parts.state else dice.choice(["row", "session"])] = dice.choice([1, None, []])


# ---- the session


def _entries(parts: Parts, dice: random.Random) -> None:
    total = parts.row["tokens"] + len(parts.session["pending"])
    changes: list[dict[str, Any]] = [{"start": -1}, {"stop": total + 1}, {"start": total + 5, "stop": total + 9}]
    entry = dict(parts.session["entries"][0]) | dice.choice([*changes, {"start": 9, "stop": 3}, {"kind": "x"}])
    parts.session["entries"].append(entry)


def _reply(parts: Parts, dice: random.Random) -> None:
    total = parts.row["tokens"] + len(parts.session["pending"])
    replies = [[total + 1, "", None], [-1, "", None], None, [3, "", 1 << 20], [0, "", 4], [1], "x"]
    parts.session["open_reply"] = dice.choice(replies)


def _sampling(parts: Parts, dice: random.Random) -> None:
    garbage = ["x", "AAAA", "", "ä", "A" * 6744, "/" * 6744, 5, ["a"]]
    parts.session["sampling"] = dice.choice(garbage)


def _dialogue(parts: Parts, dice: random.Random) -> None:
    dialogue = parts.session["dialogue"]
    changes: list[dict[str, Any]] = [{"fed": 99}, {"fed": -1}, {"generated": [0]}, {"generated": [-1]}, {"extra": 1}]
    dialogue |= dice.choice([*changes, {"messages": [{"role": "boss"}]}, {"messages": None}, {"end": "x"}])


# ---- how it was made


def _settings(parts: Parts, dice: random.Random) -> None:
    changes: list[dict[str, Any]] = [
        *({"unknown": 1}, {"cap": 1 << 40}, {"keep_recent": 10**9}, {"keep_recent": -1}, {"keep_first": "x"}),
        *({"share": 2.0}, {"share": "999GiB"}, {"share": -1}, {"share": None}, {"share": 1}, {"share": float(0)}),
        *({"seed": 10**30}, {"seed": "x"}, {"target": 2.0}, {"target": 10**9}, {"max_slots": 1}, {"chunk": 0}),
        *({"pin_pattern": "("}, {"pin_roles": ["boss"]}, {"history": "x"}, {"mode": "x"}, {"on_failure": 3}),
    ]
    parts.settings["settings"] |= dice.choice(changes)


def _made(parts: Parts, dice: random.Random) -> None:
    policy = parts.settings["policy"]
    changes: list[dict[str, Any]] = [
        *({"policy": policy | {"name": "window"}}, {"policy": policy | {"name": "../x"}}, {"policy": None}),
        *({"policy": policy | {"name": "am-halving[probe=spread]"}}, {"policy": "window"}, {"name": None}),
        *(
            {"extra_policies": [policy | {"name": "nobody"}]},
            {"extra_policies": None},
            {"settings": []},
            {"settings": None},
        ),
        *({"template": "00" * 32}, {"template": None}, {"extra": 1}),
    ]
    parts.settings |= dice.choice(changes)


def _identity(parts: Parts, dice: random.Random) -> None:
    parts.identity[dice.choice(sorted(parts.identity))] = "ab" * 32


FORGERIES: dict[str, Forgery] = {
    "lengths": _length,
    "numbers of heads": _heads,
    "too few slots": _cut,
    "more slots than the cap": _grown,
    "NaN and infinity": _not_finite,
    "positions": _positions,
    "pins": _pins("pins"),
    "request": _pins("request"),
    "layers": _layers,
    "stored queries": _samples,
    "state of the generator": _generator,
    "ids": _ids,
    "β that is denied": _bias,
    "dtypes": _dtype,
    "shapes": _shape,
    "names of tensors": _tensors,
    "tokens": _count("tokens", lambda row: row["tokens"] + 1, lambda row: row["tokens"] - 1, -1, 1 << 40, None),
    "next position": _count("next_position", lambda row: row["next_position"] + 1, 0, -1, 10**30, "x", 1.5),
    "shift": _count("shift", lambda row: row["shift"] + 1, -1, 1 << 40),
    "intact": _count("intact", lambda row: row["tokens"] + 1, lambda row: row["tokens"], 0, -1, 1 << 40),
    "allocated at": _count("headroom_at", lambda row: row["tokens"] + 1, None, -1, 1 << 40, "x"),
    "front": _front,
    "compactions and moves": _count("compactions", -1, 10**30, 1 << 31, None, 0.5),
    "scales": _count("scales", [], [0.25], [0.0] * 3, [-1.0] * 3, ["Infinity"] * 3, [1e999 * 0] * 0, None),
    "reports": _reports,
    "fields": _missing,
    "entries": _entries,
    "open reply": _reply,
    "state of sampling": _sampling,
    "dialogue": _dialogue,
    "settings": _settings,
    "how it was made": _made,
    "another identity": _identity,
}
