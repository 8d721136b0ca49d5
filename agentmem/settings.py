"""Define the frozen settings of a memory, and read and write byte counts such as ``"24MiB"``."""

from __future__ import annotations

import math
import re
from inspect import Parameter, Signature, getdoc
from textwrap import fill
from typing import TYPE_CHECKING, Annotated, Literal, Self, TypedDict

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo

from agentmem.errors import SettingsRefused
from agentmem.untrusted.texts import faults, shown

if TYPE_CHECKING:
    from pydantic._internal._model_construction import ModelMetaclass
else:
    ModelMetaclass = type(BaseModel)  # the same class; its own name is private

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
_SHOWN = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10))
_MAX_TEXT = 64
"""The most characters of a byte count."""
_BYTES = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*")


def parse_bytes(value: int | str, field: str = "bytes") -> int:
    """Read a byte count from an integer or a text such as ``"24MiB"``; error messages begin with ``field``.

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
    """Format a byte count for people: ``'24.0 MiB'``."""
    unit, size = _unit(count)
    return f"{count / size:.1f} {unit}" if size > 1 else f"{count} B"


def exact_bytes(count: int) -> str:
    """Format a byte count for messages that compare counts: ``'24.0 MiB (25165824 bytes)'``."""
    return f"{format_bytes(count)} ({count} bytes)" if count >= _SHOWN[-1][1] else f"{count} bytes"


def sufficient_bytes(count: int) -> str:
    """Return a byte count of at least ``count``, as a cap may be written: ``'24.1MiB'``."""
    unit, size = _unit(count)
    return f"{math.ceil(count / size * 10) / 10:.1f}{unit}" if size > 1 else f"{count}B"


def _unit(count: int) -> tuple[str, int]:
    """Return the largest unit that is not larger than a byte count, and its bytes."""
    return next(((unit, size) for unit, size in _SHOWN if abs(count) >= size), ("B", 1))


Mode = Literal["auto", "manual", "off"]
OnFailure = Literal["evict", "raise", "stop"]
SEED_MIN, SEED_MAX = -(1 << 63), (1 << 64) - 1
"""The range of seeds that a generator of torch accepts."""
Seed = Annotated[int, Field(ge=SEED_MIN, le=SEED_MAX)]


def _parse_cap(value: object) -> int:
    return parse_bytes(value, "cap")  # type: ignore[arg-type]  # parse_bytes refuses other types itself


def check_part(value: int | float | str, field: str) -> None:  # noqa: PYI041  # the two mean different things here
    """Check a setting that is a number or a text: a text must be a byte count; numbers are not checked here.

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


SlotDtype = Literal["auto", "int8", "k8v4", "int4"]


class SettingsOptions(TypedDict, total=False):
    """The settings other than ``cap``, as keyword arguments; :class:`Settings` describes each."""

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


class _Shown(ModelMetaclass):
    """Metaclass whose classes show in ``dir`` and ``help`` what they and their bases define, without pydantic."""

    def __dir__(cls) -> list[str]:  # noqa: N805  # ruff does not see that this is a metaclass
        """Return the public names of a class of settings."""
        own = cls.__mro__[: cls.__mro__.index(BaseModel)]
        return sorted({name for each in own for name in vars(each) if not name.startswith("_")} - {"model_config"})


class Described(BaseModel, metaclass=_Shown):
    """Base of settings: values that a user gives by keyword, checked together, and described by ``help``."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    @classmethod
    def __pydantic_init_subclass__(cls, **_: object) -> None:
        """Add the fields with their defaults and descriptions to the docstring of a class of settings."""
        fields = [
            f"{name} ({_default(field)}): {' '.join((field.description or '').split())}"
            for name, field in cls.model_fields.items()
        ]
        said = "\n".join(fill(each, 110, initial_indent="    ", subsequent_indent="        ") for each in fields)
        cls.__doc__ = f"{getdoc(cls) or ''}\n\nFields (and their defaults):\n{said}\n"
        # pydantic's own signature shows the validators
        cls.__signature__ = Signature(list(map(_parameter, cls.model_fields, cls.model_fields.values())))

    @classmethod
    def of(cls, **values: object) -> Self:
        """Build settings; raise :class:`SettingsRefused` with the field, value and limit of every violation."""
        try:
            return cls(**values)
        except ValidationError as error:
            known = ", ".join(sorted(cls.model_fields))
            raise SettingsRefused(faults(error, values) + f". Settings are: {known}") from None


def _parameter(name: str, field: FieldInfo) -> Parameter:
    default = Parameter.empty if field.is_required() else field.default
    return Parameter(name, Parameter.KEYWORD_ONLY, default=default)


def _default(field: FieldInfo) -> str:
    return "required" if field.is_required() else repr(field.default)


class Settings(Described):
    """The settings of one memory. Build them with :meth:`of`.

    Raises:
        SettingsRefused: :meth:`of` got a wrong value; the message names the field, the value and the limit. The
            constructor raises pydantic's ``ValidationError`` instead.

    """

    model_config = ConfigDict(strict=True)

    cap: Annotated[int, BeforeValidator(_parse_cap)]
    """Hard limit on all bytes of the memory and its compactions: resident bytes (R) plus temporary bytes (T)."""
    keep_first: int = Field(default=16, ge=0)
    """Length of the prefix: the number of tokens at the beginning of a row that are never compacted."""
    keep_recent: int = Field(default=96, ge=0)
    """Length of the recent window: the number of newest tokens of a row that a compaction leaves unchanged."""
    target: Target = 0.5
    """How much a compaction keeps: a fraction of the capacity (0 < f < 1), slots per head (int) or bytes ("12MiB")."""
    min_reclaim: int = Field(default=16, ge=1)
    """The fewest slots per head that a compaction must free; settings that would free fewer are refused."""
    mode: Mode = "auto"
    """When to compact: ``auto`` before the cap is exceeded, ``manual`` only on ``memory.compact()``, ``off`` never."""
    on_failure: OnFailure = "evict"
    """The reaction to a compaction that failed twice: ``evict`` drops the oldest slots beyond the budgets, ``raise``
    raises CompactionFailed, and ``stop`` ends the generation."""
    rebase: bool = False
    """If true, slots are moved to lower positions when the next token comes near the model's last position."""
    chunk: int = Field(default=1024, ge=1)
    """The most tokens of one forward. Longer prompts are fed in pieces; only a ``transcript`` probe may be longer."""
    max_slots: int | None = Field(default=None, ge=1)
    """The most slots per head, even if the cap has room for more; for comparisons at equal slots."""
    slot_dtype: SlotDtype = "auto"
    """How slots store keys and values: ``auto`` in the model's dtype, the others as codes with scales.

    Codes have 8 bits with ``int8`` and 4 bits with ``int4``; with ``k8v4``, keys have 8 bits and values 4. Slots in
    ``int8`` take about half the bytes of bfloat16 slots and a quarter of those of float32, and slots in ``int4`` about
    half of that. With codes, tokens may differ from those of stock ``generate`` even before the first compaction.
    """
    seed: Seed = 0
    """Seed of the memory's own random generator; the global random state is never used."""
