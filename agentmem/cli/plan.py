"""``agentmem plan``: show how many slots a cap holds, before any weights are loaded."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

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
from agentmem.cli.console import STDOUT, show, table, write_json
from agentmem.cli.loading import Dtype
from agentmem.planning.pricing import Plan


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
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Show how many slots a cap holds, and where its bytes go. No weights are loaded."""
    config = models.load_config(model)
    made = api.plan(
        config,
        cap=cap,
        policy=policy,
        rows=rows,
        itemsize=_itemsize(config, dtype),
        policy_options=policy_options(probe, probe_tokens),
        keep_first=keep_first,
        keep_recent=keep_recent,
        target=parse_target(target),
        chunk=chunk,
        slot_dtype=slot_dtype,
        rebase=rebase,
    )
    if as_json:
        write_json({**asdict(made), "workspace_bytes": made.workspace_bytes}, STDOUT, "--json")
    else:
        _show(made)


def _show(made: Plan) -> None:
    lines = [(name, "" if count is None else f"{count:,}", meaning) for name, count, meaning in made.table()]
    title = f"{made.policy}: {made.capacity} slots per KV head and row, {made.target} after a compaction"
    show(table(title, ("what", "bytes", "meaning"), lines, left=(0, 2)))


def _itemsize(config: object, dtype: Dtype) -> int:
    stored = getattr(config, "dtype", None) or torch.float32
    return int((stored if dtype is Dtype.AUTO else getattr(torch, dtype.value)).itemsize)
