"""``agentmem plan``: show how many slots a cap holds, before any weights are loaded."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any, get_args

import torch
import typer

from agentmem import api, models
from agentmem.cli.arguments import (
    Cap,
    Chunk,
    KeepFirst,
    KeepRecent,
    Model,
    PolicyName,
    Probe,
    ProbeTokens,
    Rebase,
    SlotNumbers,
    Target,
    parse_target,
    policy_options,
)
from agentmem.cli.console import OUT, STDOUT, show, table, write_json
from agentmem.cli.loading import Dtype
from agentmem.errors import SettingsRefused
from agentmem.planning.pricing import UNBOUNDED, Plan
from agentmem.settings import SlotDtype, format_bytes

BESIDE = ("window", "heavy-hitters", "am-halving", "am-calibrated", "am-recall", "am-pursuit")
"""Policies whose slots under the same cap are shown beside those of the policy that was asked for."""
_NO_CAP = 1 << 60


def plan(
    *,
    cap: Cap = "24MiB",
    model: Model = None,
    policy: PolicyName = "am-halving",
    rows: Annotated[int, typer.Option(min=1, help="Sequences that share the cap.")] = 1,
    keep_first: KeepFirst = 16,
    keep_recent: KeepRecent = 96,
    target: Target = "0.5",
    probe: Probe = None,
    probe_tokens: ProbeTokens = None,
    chunk: Chunk = 1024,
    slot_dtype: SlotNumbers = "auto",
    rebase: Rebase = False,
    dtype: Annotated[Dtype, typer.Option(help="Number format of keys and values.")] = Dtype.AUTO,
    tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens of a whole run: say whether they fit without a compaction.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Show how many slots a cap holds, where its bytes go, and what other policies and slots would hold.

    No weights are loaded.
    """
    config = models.load_config(model)
    options: dict[str, Any] = {
        "rows": rows,
        "itemsize": _itemsize(config, dtype),
        "keep_first": keep_first,
        "keep_recent": keep_recent,
        "target": parse_target(target),
        "chunk": chunk,
        "rebase": rebase,
    }
    own: dict[str, Any] = {
        "policy": policy,
        "policy_options": policy_options(probe, probe_tokens),
        "slot_dtype": slot_dtype,
    }
    made = api.plan(config, cap=cap, **own, **options)
    beside = {name: _slots(config, cap, name, options) for name in dict.fromkeys((*BESIDE, policy))}
    whole = None if tokens is None else _whole(config, tokens, own | options)
    if as_json:
        shown = asdict(made) | {"workspace_bytes": made.workspace_bytes, "beside": beside}
        write_json(shown | ({} if whole is None else {"whole_run_bytes": whole}), STDOUT, "--json")
        return
    _show(made)
    _show_beside(made, beside)
    if tokens is not None:
        OUT.print(_verdict(made, tokens, whole))


def _slots(config: Any, cap: str, policy: str, options: dict[str, Any]) -> dict[SlotDtype, dict[str, int] | None]:
    """Return the slots per head and the workspace for each kind of slots; ``None`` if the policy is refused."""
    found: dict[SlotDtype, dict[str, int] | None] = {}
    for kind in get_args(SlotDtype):
        try:
            made = api.plan(config, cap=cap, policy=policy, slot_dtype=kind, **options)
            found[kind] = {"capacity": made.capacity, "workspace_bytes": made.workspace_bytes}
        except SettingsRefused:  # too small a cap, or a table of head shares for another model
            found[kind] = None
    return found


def _whole(config: Any, tokens: int, settings: dict[str, Any]) -> int | None:
    """Return a cap in bytes that holds ``tokens`` tokens without a compaction.

    The result is ``None`` if a memory is never full, or if no memory is so small.
    """
    try:
        made = api.plan(config, cap=_NO_CAP, max_slots=tokens, **settings)
    except SettingsRefused:
        return None
    return None if made.capacity == UNBOUNDED else made.resident_bytes + made.workspace_bytes


def _verdict(made: Plan, tokens: int, whole: int | None) -> str:
    needed = "" if whole is None else f" Without a compaction it needs a cap of {format_bytes(whole)}."
    if made.capacity >= tokens:
        return f"A run of {tokens:,} tokens fits: nothing will be compacted.{needed}"
    return (
        f"A run of {tokens:,} tokens does not fit: a head holds {made.capacity:,} of them, and compactions make room."
        f"{needed}"
    )


def _show(made: Plan) -> None:
    lines = [(name, "" if count is None else f"{count:,}", meaning) for name, count, meaning in made.table()]
    title = f"{made.policy}: {made.capacity} slots per KV head and row, {made.target} after a compaction"
    show(table(title, ("what", "bytes", "meaning"), lines, left=(0, 2)))


def _show_beside(made: Plan, beside: dict[str, dict[SlotDtype, dict[str, int] | None]]) -> None:
    """Print the slots of each policy for each kind of slots; in brackets the workspace in per cent of the cap."""
    lines = [
        (name, *("–" if each is None else _slots_text(each, made.cap_bytes) for each in found.values()))
        for name, found in beside.items()
    ]
    title = "slots per head by policy and --slot-dtype (workspace in % of the cap)"
    show(table(title, ("policy", *get_args(SlotDtype)), lines, left=(0,)))


def _slots_text(found: dict[str, int], cap: int) -> str:
    if found["capacity"] == UNBOUNDED:
        return "never full"
    return f"{found['capacity']:,} ({100 * found['workspace_bytes'] / cap:.0f})"


def _itemsize(config: object, dtype: Dtype) -> int:
    stored = getattr(config, "dtype", None) or torch.float32
    return int((stored if dtype is Dtype.AUTO else getattr(torch, dtype.value)).itemsize)
