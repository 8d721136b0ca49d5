"""Run a calibration on one process or several; units of work that were measured before are not measured again."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch

from agentmem import hf, plugins
from agentmem.calibration.methods import make_work
from agentmem.calibration.partial import Partial
from agentmem.calibration.table import VERSION, as_table, write_table
from agentmem.contracts import ModelIdentity
from agentmem.hf.capture import reading
from agentmem.hf.fingerprint import fingerprint

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel

    from agentmem.calibration.table import Origin
    from agentmem.calibration.terms import Terms

_PATIENCE = timedelta(days=7)

Progress = Callable[[int, int], None]
"""Callback that receives the number of units of work done and the total number of units.

A unit is one window of the text, or one head in one window."""


def calibrate(
    model: PreTrainedModel,
    ids: torch.Tensor,
    terms: Terms,
    origin: Origin,
    *,
    name: str,
    out: Path,
    fresh: bool = False,
    progress: Progress = lambda _done, _all: None,
) -> dict[str, Any]:
    """Measure on the text ``ids [n]`` how many slots each head needs, write a table to ``out``, and return the table.

    The work is divided into units: one window (piece of the text), or one head in one window. If ``torchrun`` or
    ``accelerate launch`` started several processes, each process measures a part of the units. The first process writes
    the table.

    The results of the units are stored beside ``out`` until the table is written, so that a calibration that was
    stopped can be resumed. With ``fresh``, everything is measured again. The model is left as it was. ``name`` is the
    model's name in the table.

    Raises:
        SettingsRefused: the model, the text or the policy cannot be used for this calibration.
        AgentmemError: a file cannot be written.

    """
    inner = hf.text_model(model)
    shape = hf.describe(inner.config, itemsize=inner.dtype.itemsize)
    heads = {layer: shape.layers[layer].kv_heads for layer in shape.compactable}
    identity = ModelIdentity(name, fingerprint(inner), tuple(heads.values()))
    compactor = None if terms.method == "attention" else plugins.policy(terms.policy).compactor
    team = Team.joined()
    partial = Partial(out, _key(identity, ids, terms), team.rank)
    if fresh and team.rank == 0:
        partial.remove()
    team.wait()
    with reading(inner, [layer.window for layer in shape.layers]) as reader:
        work = make_work(reader, ids, terms, heads, compactor)
        units, done = work.units(), partial.load()
        progress(len(done), len(units))
        for unit in units[team.rank :: team.size]:
            if unit not in done:
                done[unit] = work.measure(unit)
                partial.put(unit, done[unit])
                progress(len(done), len(units))
        team.wait()
        done = partial.load()
        table = as_table(identity, terms, origin, work.found(done))
    if team.rank == 0:
        write_table(out, table)
    team.wait()
    if team.rank == 0:
        partial.remove()
    return table


@dataclass(frozen=True, slots=True)
class Team:
    """The processes that share a calibration: ``rank`` is the number of this process, ``size`` their number."""

    rank: int = 0
    size: int = 1
    wait: Callable[[], None] = lambda: None
    """Wait until every process has called this function."""

    @classmethod
    def joined(cls) -> Team:
        """Return the team of all processes that were launched together; a single process does not need accelerate."""
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return cls()
        from accelerate import PartialState

        # Without cpu=True, processes are not joined on a CPU. The timeout lets a process wait while the others work.
        state = PartialState(cpu=not torch.cuda.is_available(), timeout=_PATIENCE)
        return cls(state.process_index, state.num_processes, state.wait_for_everyone)


def _key(identity: ModelIdentity, ids: torch.Tensor, terms: Terms) -> str:
    """Return a digest of everything that a measurement depends on: file format, model, text and settings."""
    facts = {
        "version": VERSION,
        "model": identity.fingerprint,
        "ids": hashlib.sha256(ids.cpu().numpy().tobytes()).hexdigest(),
        "terms": asdict(terms),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
