"""Float64 oracles of rotary positions in plain loops. Nothing of the package is imported.

Numbers are Python floats, vectors are lists. Frequencies are written from the papers: RoPE (arXiv:2104.09864), linear
(arXiv:2306.15595), YaRN (arXiv:2309.00071, NTK-by-parts) and Llama 3 (arXiv:2407.21783 and its published code).
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from itertools import pairwise
from typing import Any


def frequencies(width: int, rope: Mapping[str, Any]) -> list[float]:
    """Radians a position of each of the ``width / 2`` pairs."""
    plain = [rope["rope_theta"] ** (-2 * pair / width) for pair in range(width // 2)]
    kind = rope["rope_type"]
    if kind == "linear":
        return [each / rope["factor"] for each in plain]
    if kind == "yarn":
        return [yarn(each, pair, width, rope) for pair, each in enumerate(plain)]
    if kind == "llama3":
        return [llama3(each, rope) for each in plain]
    assert kind == "default"
    return plain


def yarn(frequency: float, pair: int, width: int, rope: Mapping[str, Any]) -> float:
    """Fast pairs stay, slow ones are interpolated, those between are ramped by their place."""
    trained, base = rope["original_max_position_embeddings"], rope["rope_theta"]
    fast, slow = (
        width * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(base))
        for turns in (rope.get("beta_fast", 32), rope.get("beta_slow", 1))
    )
    low, high = max(math.floor(fast), 0), min(math.ceil(slow), width - 1)
    ramp = min(1.0, max(0.0, (pair - low) / (high - low)))
    return float(frequency * (1 - ramp) + frequency / rope["factor"] * ramp)


def llama3(frequency: float, rope: Mapping[str, Any]) -> float:
    """Short waves stay, long ones are interpolated, those between are blended by how often they turn in training."""
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    turns = rope["original_max_position_embeddings"] * frequency / (2 * math.pi)
    blend = min(1.0, max(0.0, (turns - low) / (high - low)))
    return float(frequency * blend + frequency / rope["factor"] * (1 - blend))


def single(number: float) -> float:
    """The nearest float32."""
    return float(struct.unpack("f", struct.pack("f", number))[0])


def angle(position: int, frequency: float) -> float:
    """The angle of a pair at a position as models compute it: a product of float32 numbers, rounded to float32."""
    return single(position * frequency)


def turned(key: list[float], angles: list[float]) -> list[float]:
    """The key with dims ``i`` and ``i + len(angles)`` turned by ``angles[i]``; later dims stay."""
    half, result = len(angles), list(key)
    for pair, turn in enumerate(angles):
        low, high = key[pair], key[pair + half]
        result[pair] = low * math.cos(turn) - high * math.sin(turn)
        result[pair + half] = high * math.cos(turn) + low * math.sin(turn)
    return result


def moved(key: list[float], position: int, delta: int, turns: list[float]) -> list[float]:
    """A key stored at a position, as it would be stored ``delta`` positions further."""
    back = turned(key, [-angle(position, each) for each in turns])
    return turned(back, [angle(position + delta, each) for each in turns])


def places(positions: list[int], start: int, end: int, gap: int) -> list[int]:
    """Where a head's slots go when the recent block goes from ``start`` to ``end``: the newest first, none upwards."""
    found, above, place = {}, start, end
    for position in sorted(positions, reverse=True):
        place -= min(above - position, gap)
        found[position] = min(position, place)
        above = position
    return [found[position] for position in positions]


def fits(positions: list[int], start: int, span: int, gap: int) -> bool:
    """Whether a head's slots take ``span`` positions at most when none is further than ``gap`` from the next."""
    ordered = [*sorted(positions), start]
    return sum(min(after - before, gap) for before, after in pairwise(ordered)) <= span
