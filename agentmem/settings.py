"""Frozen settings, as a user writes them. Ratios and byte texts become integers here, once."""

from __future__ import annotations

import math
import re
from typing import Annotated, Literal, TypedDict

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from agentmem.errors import SettingsRefused
from agentmem.untrusted.texts import faults, shown

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
_MAX_TEXT = 64
"""Characters of a byte count."""
_BYTES = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*")


def parse_bytes(value: int | str, field: str = "bytes") -> int:
    """Bytes from an integer or a text such as ``"24MiB"``, ``"1.5 GB"``; ``field`` is what a refusal names.

    Raises:
        SettingsRefused: the text is no byte count, or the count is not positive.

    """
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise SettingsRefused(f"{field}: {shown(value)} is neither an integer nor a text; write 25165824 or '24MiB'")
    if isinstance(value, str):
        match = _BYTES.fullmatch(value) if len(value) <= _MAX_TEXT else None
        unit = match.group(2).lower() if match else None
        if match is None or unit not in _UNITS:
            raise SettingsRefused(
                f"{field}: cannot read {shown(value)}; write an integer, or a number with one of "
                "B, KB, MB, GB, KiB, MiB, GiB, as in '24MiB'"
            )
        count = math.floor(float(match.group(1)) * _UNITS[unit])
    else:
        count = value
    if count <= 0:
        said = f"{value!r} is {count} bytes, and " if isinstance(value, str) else ""
        raise SettingsRefused(f"{field}: {said}{count} is not positive; give at least 1")
    return count


def format_bytes(count: int) -> str:
    """A byte count for people: ``'24.0 MiB'``."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(count) >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"


Mode = Literal["auto", "manual", "off"]
OnFailure = Literal["evict", "raise", "stop"]
SEED_MIN, SEED_MAX = -(1 << 63), (1 << 64) - 1
"""What a generator of torch takes."""
Seed = Annotated[int, Field(ge=SEED_MIN, le=SEED_MAX)]


def _parse_cap(value: object) -> int:
    return parse_bytes(value, "cap")  # type: ignore[arg-type]  # parse_bytes refuses other types itself


def check_part(value: int | float | str, field: str) -> None:  # noqa: PYI041  # the two mean different things here
    """Refuse a text that is no byte count where a fraction could stand, too.

    Raises:
        SettingsRefused: the text is no byte count.

    """
    if isinstance(value, str):
        try:
            parse_bytes(value, field)
        except SettingsRefused as error:
            raise SettingsRefused(f"{error}; a fraction is a number such as 0.5, without quotes") from None


def _check_target(value: int | float | str) -> int | float | str:  # noqa: PYI041  # the same
    check_part(value, "target")
    return value


Target = Annotated[int | float | str, Field(union_mode="left_to_right"), AfterValidator(_check_target)]


SlotDtype = Literal["auto", "int8"]


class SettingsOptions(TypedDict, total=False):
    """The settings beside ``cap`` as keyword arguments; :class:`Settings` says what each is."""

    keep_first: int
    keep_recent: int
    target: int | float | str
    min_reclaim: int
    mode: Mode
    on_failure: OnFailure
    rebase: bool
    chunk: int
    max_slots: int | None
    slot_dtype: SlotDtype
    seed: int


class Settings(BaseModel):
    """How one memory behaves. All counts are integers; see the field descriptions.

    Raises:
        SettingsRefused: through :meth:`of`, with the field, the value and the limit.

    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    cap: Annotated[int, BeforeValidator(_parse_cap)]
    """Hard limit in bytes over everything that the memory and its compactions allocate (R + T)."""
    keep_first: int = Field(default=16, ge=0)
    """The prefix: first tokens of a row that are never compacted."""
    keep_recent: int = Field(default=96, ge=0)
    """The recent window: last tokens of a row that are never compacted."""
    target: Target = 0.5
    """What a compaction leaves: a fraction of the capacity (0 < f < 1), slots per head (int), or bytes ("12MiB")."""
    min_reclaim: int = Field(default=16, ge=1)
    """Slots per head that a compaction must free at least; a plan that frees fewer is refused (no thrashing)."""
    mode: Mode = "auto"
    """``auto`` compacts when the cap would be crossed; ``manual`` only on ``memory.compact()``; ``off`` never."""
    on_failure: OnFailure = "evict"
    """After a compaction failed twice: ``evict`` to the budgets, ``raise`` CompactionFailed, or ``stop`` generating."""
    rebase: bool = False
    """Move slots to lower positions when the next one nears the end of the model's positions."""
    chunk: int = Field(default=1024, ge=1)
    """Most tokens in one forward: prompts are fed in pieces of it, probes are no longer than it."""
    max_slots: int | None = Field(default=None, ge=1)
    """Use at most this many slots per head although the cap has room for more (comparisons at equal slots)."""
    slot_dtype: SlotDtype = "auto"
    """What slots hold of keys and values: ``auto`` the model's own numbers, ``int8`` codes of 8 bits and scales.

    Quantised slots take about half the bytes of bfloat16 ones and a quarter of float32's. Tokens may then differ from
    those of stock ``generate`` below the cap too.
    """
    seed: Seed = 0
    """Seed of the memory's own random generator; the global random state is never touched."""

    @classmethod
    def of(cls, **values: object) -> Settings:
        """Build settings; every violation becomes one :class:`SettingsRefused` with field, value and limit."""
        try:
            return cls(**values)  # type: ignore[arg-type]  # pydantic validates
        except ValidationError as error:
            known = ", ".join(sorted(cls.model_fields))
            raise SettingsRefused(faults(error, values) + f". Settings are: {known}") from None
