"""Parse the short texts in which users compose policies, budgets and mixtures of queries, and lists of such texts.

| text | parsed by |
| --- | --- |
| ``name[option=value,option=value]`` | :func:`parsed`; a value may be such a text itself |
| ``one,two[option=value],three`` | :func:`entries` |
| ``source:share*weight+source`` | :func:`mixture` |

A text of the first form is called a *spec*. Texts may come from untrusted sources, so their characters and parts are
limited in number. A text that cannot be parsed raises a ValueError that quotes the text, names the fault and shows the
right form.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from functools import lru_cache
from numbers import Integral, Real
from types import UnionType
from typing import Literal, Union, get_args, get_origin

from agentmem.untrusted.texts import did_you_mean, shown

MAX_CHARACTERS = 4096
"""The most characters of one text."""
MAX_PARTS = 256
"""The most options of a spec, entries of a list or terms of a mixture."""
SPEC = "name[option=value,option=value]"
"""The form of a name with options, which error messages show."""
_NUMBER = r"(\d++(?:\.\d*+)?|\.\d++)"  # possessive: no backtracking into a run of digits
_TERM = re.compile(rf"\s*+([a-z-]++)(?::{_NUMBER})?(?:\*{_NUMBER})?\s*+")


@dataclass(frozen=True, slots=True)
class Spec:
    """A name and its options, with values as texts. ``str`` of a spec gives a text that parses to an equal spec."""

    name: str
    options: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        """Write ``name[option=value,option=value]``, or the name alone if there are no options."""
        written = ",".join(f"{option}={value}" for option, value in self.options.items())
        return f"{self.name}[{written}]" if written else self.name


@dataclass(frozen=True, slots=True)
class Term:
    """One term of a mixture, such as ``a:3*0.5``: a name, a share and a weight.

    The share is relative to the shares of the other terms. The weight applies to each query of the named source.
    """

    name: str
    share: float = 1.0
    weight: float = 1.0

    def __str__(self) -> str:
        """Write ``name``, ``name:share``, ``name*weight`` or ``name:share*weight``; a number that is 1 is omitted."""
        pairs = ((":", self.share), ("*", self.weight))
        return self.name + "".join(f"{sign}{Decimal(repr(number)):f}" for sign, number in pairs if number != 1)


# ---- reading


def parsed(text: str, what: str) -> Spec:
    """Parse a spec into its name and options; a plain name has no options. Error messages begin with ``what``.

    Raises:
        ValueError: the text is too long, cannot be parsed, has too many options or gives an option twice.

    """
    _check_length(text, what)
    name, bracket, rest = (part.strip() for part in text.partition("["))
    if not bracket and "]" not in name:
        return Spec(name)
    if not name or not rest.endswith("]"):
        raise ValueError(f"{what} {shown(text)} cannot be read: {_misplaced(name, rest)}; write {SPEC}")
    options: dict[str, str] = {}
    for item in _split(rest[:-1], text, what):
        option, equals, value = (part.strip() for part in item.partition("="))
        if not option.isidentifier() or not equals or not value:
            raise ValueError(f"{what} {shown(text)} cannot be read: {shown(item)} is no option=value; write {SPEC}")
        if option in options:
            raise ValueError(f"{what} {shown(text)}: option {option!r} is given twice; give it once")
        options[option] = value
    return Spec(name, options)


def entries(text: str, what: str) -> list[str]:
    """Split a comma-separated list and drop empty entries; commas inside brackets do not separate entries.

    Raises:
        ValueError: the text is too long, has too many entries, or has an unmatched bracket.

    """
    _check_length(text, what)
    return [entry for entry in _split(text, text, what) if entry]


def mixture(text: str, what: str) -> list[Term]:
    """Parse a mixture such as ``a:3+b:1*0.5``: terms ``source[:share][*weight]`` joined by ``+``.

    Raises:
        ValueError: the text is too long, has too many terms, or has a term that cannot be parsed.

    """
    _check_length(text, what)
    terms = []
    for piece in _counted(text.split("+"), text, what):
        match = _TERM.fullmatch(piece)
        if match is None:
            raise ValueError(
                f"{what}: cannot read {shown(piece)}; write source[:share][*weight], as in replay:3+spread"
            )
        name, share, weight = match.groups()
        terms.append(Term(name, float(share or 1), float(weight or 1)))
    return terms


def plain_name(text: str) -> str:
    """Return the name of a valid spec without its options; the spec is not checked."""
    return text.partition("[")[0].strip()


# ---- options for a factory


def typed(options: Mapping[str, str], factory: Callable[..., object]) -> dict[str, object]:
    """Convert the texts of a spec's options to integers, floats or truth values if possible; but an option whose
    default is a text stays a text, because such a text (a pattern, say) may consist of digits.
    """  # noqa: D205 - one sentence
    known = _parameters(factory)
    texts = {name for name, parameter in known.items() if isinstance(parameter.default, str)}
    return {name: value if name in texts else _value(value) for name, value in options.items()}


def check_options(options: Mapping[str, object], factory: Callable[..., object], what: str) -> None:
    """Check that a factory accepts all the given options; call this before calling the factory.

    Raises:
        ValueError: an option is unknown; the message suggests a similar one and lists all.

    """
    known = _parameters(factory)
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values()):
        return
    for option in options:
        if option not in known:
            raise ValueError(
                f"{what} has no option {shown(option)}; {did_you_mean(option, known)}"
                f"Its options: {', '.join(known) or 'none'}"
            )


def check_values(options: Mapping[str, object], factory: Callable[..., object], what: str) -> None:
    """Check the values of options by the annotations of the factory's parameters; ranges are left to the factory.

    Numbers, truth values, texts and ``None`` are checked. Other annotations allow any value.

    Raises:
        ValueError: a value is of another type; the message names the value, the types and an example.

    """
    known = _parameters(factory)
    for option, value in options.items():
        parameter = known.get(option)
        if parameter is not None and not _fits(value, parameter.annotation):
            kinds = " or ".join(_kinds(parameter.annotation))
            default = parameter.default
            example = "" if default in (None, "", parameter.empty) else f", such as {_written(default)}"
            raise ValueError(
                f"{what}: {option}={shown(value)} is {_kind_of(value)}, and the option takes {kinds}; give one{example}"
            )


_KINDS: dict[object, tuple[type | tuple[type, ...], str]] = {
    bool: (bool, "true or false"),
    int: (Integral, "a whole number"),
    float: (Real, "a number"),
    str: (str, "a text"),
    type(None): (type(None), "None"),
}
"""Of each annotation that is checked, the types of its values and its name in messages."""


def _fits(value: object, annotation: object) -> bool:
    alternatives = _alternatives(annotation)
    if any(each not in _KINDS for each in alternatives):
        return True
    if isinstance(value, bool):
        return bool in alternatives
    return any(isinstance(value, _KINDS[each][0]) for each in alternatives)


def _kinds(annotation: object) -> list[str]:
    return [_KINDS[each][1] for each in _alternatives(annotation)]


def _alternatives(annotation: object) -> list[object]:
    """Return the types of a union or a plain annotation; those of a literal are the types of its values."""
    origin = get_origin(annotation)
    if origin in (Union, UnionType):
        return [each for part in get_args(annotation) for each in _alternatives(part)]
    if origin is Literal:
        return list(dict.fromkeys(type(each) for each in get_args(annotation)))
    return [type(None) if annotation is None else annotation]


def _kind_of(value: object) -> str:
    named = [name for kind, name in _KINDS.values() if isinstance(value, kind)]
    return named[0] if named else f"a {type(value).__name__}"


def _written(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


@lru_cache(maxsize=256)
def _parameters(factory: Callable[..., object]) -> Mapping[str, inspect.Parameter]:
    """Return the parameters of a factory by name, from a cache if possible.

    Annotations are values, unless one of them cannot be read when the program runs; then all are texts. The cache saves
    time, because :mod:`inspect` is slow for a class without a constructor.
    """
    try:
        return inspect.signature(factory, eval_str=True).parameters
    except NameError:
        return inspect.signature(factory).parameters


def _value(text: str) -> object:
    return text == "true" if text in ("true", "false") else number(text)


def number(text: str) -> int | float | str:
    """Return the text as an integer or, failing that, as a float; return it unchanged if it is no number."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


# ---- bounds and brackets


def _check_length(text: str, what: str) -> None:
    if len(text) > MAX_CHARACTERS:
        raise ValueError(
            f"{what} {text[:40]!r}… has {len(text)} characters; {MAX_CHARACTERS} are allowed. Make it in Python"
        )


def _counted(parts: list[str], text: str, what: str) -> list[str]:
    if len(parts) > MAX_PARTS:
        raise ValueError(f"{what} {text[:40]!r}… has {len(parts)} parts; {MAX_PARTS} are allowed. Make it in Python")
    return parts


def _split(text: str, whole: str, what: str) -> list[str]:
    """Split ``text`` at its commas outside brackets; error messages quote ``whole``."""
    pieces, start, depth = [], 0, 0
    for index, character in enumerate(text):
        depth += (character == "[") - (character == "]")
        if depth < 0:
            break
        if character == "," and depth == 0:
            pieces.append(text[start:index].strip())
            start = index + 1
    if depth:
        fault = "a '[' is never closed" if depth > 0 else "a ']' closes nothing"
        raise ValueError(f"{what} {shown(whole)} cannot be read: {fault}; write {SPEC}")
    return _counted([*pieces, text[start:].strip()], whole, what)


def _misplaced(name: str, rest: str) -> str:
    if not rest:
        return "']' without '['" if "]" in name else "nothing follows '['"
    if "]" not in rest:
        return "its '[' is never closed"
    return "']' does not end it" if name else "no name before '['"
