"""The names of the head budgets, for policies whose option ``budgets`` selects them by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from agentmem import specs
from agentmem.contracts import Budgets
from agentmem.policies.budgets.adaptive import Adaptive
from agentmem.policies.budgets.calibrated import Calibrated
from agentmem.policies.budgets.global_budgets import Global
from agentmem.policies.budgets.pyramid import Pyramid
from agentmem.policies.budgets.sensitivity import Sensitivity
from agentmem.policies.budgets.uniform import Uniform
from agentmem.untrusted.texts import did_you_mean, shown

NAMES: dict[str, Callable[..., Budgets]] = {
    "uniform": Uniform,
    "global": Global,
    "calibrated": Calibrated,
    "sensitivity": Sensitivity,
    "pyramid": Pyramid,
    "adaptive": Adaptive,
}


def by_name(name: str, **options: Any) -> Budgets:
    """Make head budgets from a name or a spec such as ``"calibrated[floor=0.5,table=mine.json]"``.

    ``options`` are added to the options in the spec, and override them.

    Raises:
        ValueError: the spec cannot be read, the name or an option is unknown (the message suggests the nearest), or a
            value is out of range.

    """
    spec = specs.parsed(name, "budgets")
    if spec.name not in NAMES:
        hint = did_you_mean(spec.name, NAMES)
        raise ValueError(
            f"budgets: {shown(spec.name)} is unknown; {hint}choose one of {', '.join(NAMES)}; options follow "
            "in brackets, as in calibrated[floor=0.5]"
        )
    make = NAMES[spec.name]
    specs.check_options({**spec.options, **options}, make, f"budgets {spec.name!r}")
    values = specs.typed(spec.options, make) | options
    specs.check_values(values, make, f"budgets {spec.name!r}")
    return make(**values)
