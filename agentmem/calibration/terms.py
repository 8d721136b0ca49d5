"""Define the settings of a calibration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from agentmem.errors import SettingsRefused
from agentmem.settings import SEED_MAX, SEED_MIN

Method = Literal["attention", "fisher", "loss"]

METHODS: tuple[Method, ...] = get_args(Method)


@dataclass(frozen=True)
class Terms:
    """Settings of a calibration: how a text is cut into windows, and what is measured in each window.

    A window is a context and the tokens that follow it. ``keep_first`` and ``keep_recent`` tokens of the context stay
    as they are; the tokens between them are the segment.
    """

    method: Method = "attention"
    context: int = 512
    ahead: int = 128
    """Tokens after the context, on which ``fisher`` and ``loss`` measure errors; ``attention`` needs none."""
    keep_first: int = 16
    keep_recent: int = 96
    ratios: tuple[float, ...] = (0.125, 0.25, 0.5)
    """Fractions of all slots to keep; slots are allocated to heads at each fraction, and the shares are averaged."""
    fractions: tuple[float, ...] = (0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75)
    """Fractions of one head's slots to keep; the head's error is measured at each fraction."""
    samples: int = 4
    """Number of next tokens that ``fisher`` draws from the model at every position; other methods draw none."""
    policy: str = "am-halving"
    """Policy whose compactor ``fisher`` and ``loss`` measure."""
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            SettingsRefused: a setting is unknown or out of range.

        """
        if self.method not in METHODS:
            raise SettingsRefused(f"method: {self.method!r} is unknown; choose one of {', '.join(METHODS)}")
        least = self.keep_first + self.keep_recent + 1
        if self.context < least:
            raise SettingsRefused(
                f"context: {self.context} tokens leave no segment between keep_first={self.keep_first} and "
                f"keep_recent={self.keep_recent}; give at least {least}"
            )
        for name in ("ahead", "samples"):
            if getattr(self, name) < 1:
                raise SettingsRefused(f"{name}: {getattr(self, name)} is too few; give at least 1")
        for name in ("ratios", "fractions"):
            values: tuple[float, ...] = getattr(self, name)
            rising = all(low < high for low, high in zip((0.0, *values), (*values, 1.0), strict=True))
            if not values or not rising:
                raise SettingsRefused(f"{name}: {values} do not rise between 0 and 1")

        if not SEED_MIN <= self.seed <= SEED_MAX:
            raise SettingsRefused(f"seed: {self.seed} is beyond what a generator takes; give one of 64 bits")

    @property
    def segment(self) -> int:
        """Return the number of slots of a head's segment."""
        return self.context - self.keep_first - self.keep_recent

    @property
    def window(self) -> int:
        """Return the number of tokens of one window."""
        return self.context if self.method == "attention" else self.context + self.ahead
