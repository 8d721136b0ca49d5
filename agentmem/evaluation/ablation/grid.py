"""List the cells of an ablation.

An *instrument* is a kind of measurement: fidelity, recall or a task. A *cell* is one combination of the ablation's
settings, measured by one instrument.
"""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING, Any

from agentmem.errors import SettingsRefused
from agentmem.evaluation.ablation.config import MAX_CELLS, Ablation, Text, limits
from agentmem.evaluation.recall import FULL, WINDOW
from agentmem.evaluation.terms import Frozen, Terms
from agentmem.settings import SlotDtype, format_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator


class Cell(Frozen):
    """One measurement of the grid: an instrument (fidelity, recall or a task) with one combination of settings.

    A cell has a limit either in ``slots`` or in ``cap_bytes``; for full memory, both are ``None``.
    """

    instrument: str
    model: str
    text: Text | None
    """Text that the cell reads; ``None`` for tasks, which have texts of their own."""
    policy: str
    slots: int | None
    cap_bytes: int | None
    keep_first: int
    keep_recent: int
    target: int | float | str
    chunk: int
    slot_dtype: SlotDtype
    seed: int

    @property
    def terms(self) -> Terms:
        """Return the settings of the memory that the cell is measured with."""
        names = ("slots", "cap_bytes", "keep_first", "keep_recent", "target", "chunk", "slot_dtype", "seed")
        return Terms(**{name: getattr(self, name) for name in names})

    @property
    def label(self) -> str:
        """Return a line of text by which progress output and error messages name this measurement."""
        limit = "" if self.limit is None else f", {self.limit}"
        source = "" if self.text is None else f", {self.text.label}"
        return f"{self.instrument}{source}, {self.policy}{limit}, seed {self.seed}"

    @property
    def source(self) -> str:
        """Return what tables show as the source of this measurement: the name of the text that the model reads.

        A task brings texts of its own. If a task is measured, the result is therefore the name of the task.
        """
        return self.instrument if self.text is None else self.text.label

    @property
    def limit(self) -> str | None:
        """Return the limit of the memory as tables show it, such as ``512 slots``; ``None`` for full memory."""
        if self.cap_bytes is not None:
            return format_bytes(self.cap_bytes)
        return None if self.slots is None else f"{self.slots} slots"


_PLAIN = {"target": 0.5, "slot_dtype": "auto"}
"""Values of required fields in the cells of full memory; they have no effect without compactions."""


def cells(ablation: Ablation) -> tuple[Cell, ...]:
    """Return all cells of an ablation, grouped by model, then by instrument, text and seed.

    An instrument is a kind of measurement: fidelity, recall or a task. A cell is one combination of settings, measured
    by one instrument.

    Recall and tasks also get cells of full memory as a reference; recall also gets cells of the policy ``window``.
    Fidelity gets no such cells, because each fidelity measurement already compares a policy with full memory.

    Raises:
        SettingsRefused: the grid has more than 100,000 cells.

    """
    size = len(list(limits(ablation)))
    for name in ("models", "texts", "seeds", "policies", "keep_first", "keep_recent", "target", "slot_dtype"):
        size *= len(getattr(ablation, name))
    if size * len(ablation.instruments.chosen) > MAX_CELLS:
        raise SettingsRefused(f"the grid has more than {MAX_CELLS:,} cells; give shorter lists")
    return tuple(_cells(ablation))


def _cells(ablation: Ablation) -> Iterator[Cell]:
    for model, instrument in product(ablation.models, ablation.instruments.chosen):
        texts = (None,) if instrument in ablation.instruments.tasks else ablation.texts
        for text, seed in product(texts, ablation.seeds):
            yield from _at(ablation, instrument=instrument, model=model, text=text, seed=seed, chunk=ablation.chunk)


def _at(ablation: Ablation, **same: Any) -> Iterator[Cell]:
    """Yield the cells that have the instrument, model, text, seed and chunk given in ``same``.

    The instrument is the kind of measurement: fidelity, recall or a task.
    """
    policies = ablation.policies
    if same["instrument"] != "fidelity":
        yield Cell(**same, slots=None, cap_bytes=None, policy=FULL, keep_first=0, keep_recent=0, **_PLAIN)
    if same["instrument"] == "recall":
        policies = tuple(dict.fromkeys((WINDOW, *policies)))
    kept = product(ablation.keep_first, ablation.keep_recent, ablation.target, ablation.slot_dtype)
    for (slots, cap), (first, recent, target, slot_dtype), policy in product(limits(ablation), list(kept), policies):
        yield Cell(
            **same,
            policy=policy,
            slots=slots,
            cap_bytes=cap,
            keep_first=first,
            keep_recent=recent,
            target=target,
            slot_dtype=slot_dtype,
        )
