"""Options that several commands share, so that their names and help texts are equal everywhere."""

from __future__ import annotations

from typing import Annotated

import typer

from agentmem import specs
from agentmem.settings import SlotDtype

LEAST_TEMPERATURE = 1e-30
"""Smallest accepted temperature above 0: dividing the logits of any model by it gives finite float32 numbers."""


def _check_temperature(value: float) -> float:
    if 0 < value < LEAST_TEMPERATURE:
        raise typer.BadParameter(
            f"{value} is too small to divide logits by; give at least {LEAST_TEMPERATURE}, or 0 for greedy decoding"
        )
    return value


Model = Annotated[
    str | None, typer.Option(help="Hugging Face id or folder; without it the default model.", show_default=False)
]
Cap = Annotated[str, typer.Option(help="Hard limit in bytes: 25165824, 24MiB, 1.5GB.")]
Temperature = Annotated[float, typer.Option(min=0.0, callback=_check_temperature, help="0 is greedy.")]
PolicyName = Annotated[
    str,
    typer.Option(help="An installed policy, or with options: am-halving\\[budgets=global]; see `agentmem policies`."),
]
KeepFirst = Annotated[int, typer.Option(min=0, help="First tokens that are never compacted.")]
KeepRecent = Annotated[int, typer.Option(min=0, help="Last tokens that are never compacted.")]
Target = Annotated[str, typer.Option(help="What a compaction leaves: a fraction (0.5), slots (256) or bytes (12MiB).")]
Chunk = Annotated[int, typer.Option(min=1, help="Most tokens in one forward.")]
SlotNumbers = Annotated[
    SlotDtype,
    typer.Option(
        help="What slots hold: auto is the model's own numbers, the others are codes of so many bits, in fewer bytes."
    ),
]
Device = Annotated[
    str, typer.Option(help="Where the model and its memory are: cpu, cuda, cuda:1, mps; auto spreads over all GPUs.")
]
Rebase = Annotated[
    # There is no --no-rebase, because the help text would need a further column for it.
    bool, typer.Option("--rebase", help="Go on past the model's positions by moving slots to lower ones.")
]
Probe = Annotated[
    str | None,
    typer.Option(
        help="Where reference queries come from: source[:share][*weight], joined by +, as in replay:3+spread.",
        show_default=False,
    ),
]
ProbeTokens = Annotated[
    int | None, typer.Option(min=1, help="Reference tokens; without it the plan chooses.", show_default=False)
]


def parse_target(text: str) -> int | float | str:
    """Convert a target to the type that the settings expect.

    ``"256"`` becomes an int (slots) and ``"0.5"`` a float (a fraction); any other text, such as ``"12MiB"``, is
    returned unchanged, and the settings parse it as a number of bytes.
    """
    return specs.number(text)


def policy_options(probe: str | None, probe_tokens: int | None) -> dict[str, object]:
    """Return the policy options that the user gave; the policy later refuses options that it does not have."""
    return {name: value for name, value in (("probe", probe), ("probe_tokens", probe_tokens)) if value is not None}
