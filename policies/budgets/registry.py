"""Head budgets by name, for policies that let a user choose."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable
from typing import Any

from agentmem.contracts import Budgets
from agentmem.policies.budgets.adaptive import Adaptive
from agentmem.policies.budgets.calibrated import Calibrated
from agentmem.policies.budgets.global_budgets import Global
from agentmem.policies.budgets.pyramid import Pyramid
from agentmem.policies.budgets.sensitivity import Sensitivity
from agentmem.policies.budgets.uniform import Uniform

NAMES: dict[str, Callable[..., Budgets]] = {
    "uniform": Uniform,
    "global": Global,
    "calibrated": Calibrated,
    "sensitivity": Sensitivity,
    "pyramid": Pyramid,
    "adaptive": Adaptive,
}


def by_name(name: str, **options: Any) -> Budgets:
    """The budgets of that name, made with their own options.

    Options may also follow the name, where only a text can be given: ``"calibrated;floor=0.5;table=mine.json"``.

    Raises:
        ValueError: the name or an option is unknown (the message suggests the nearest), or a value cannot work.

    """
    name, *written = (part.strip() for part in name.split(";"))
    options = dict(map(_option, written)) | options
    if name not in NAMES:
        raise ValueError(f"budgets: {name!r} is unknown; {_hint(name, NAMES)}choose one of {', '.join(NAMES)}")
    known = inspect.signature(NAMES[name]).parameters
    for option in options:
        if option not in known:
            listed = ", ".join(known) or "none"
            raise ValueError(
                f"budgets {name!r} have no option {option!r}; {_hint(option, known)}their options: {listed}"
            )
    return NAMES[name](**options)


def _option(text: str) -> tuple[str, Any]:
    """``key=value``; a number where it reads as one."""
    key, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"budgets: {text!r} is no option; write key=value, as in calibrated;floor=0.5")
    if key.strip() == "table":  # a file may be named 123
        return "table", value.strip()
    if value in ("true", "false"):
        return key.strip(), value == "true"
    try:
        return key.strip(), float(value)
    except ValueError:
        return key.strip(), value.strip()


def _hint(wrong: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(wrong, known, n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}? " if near else ""
