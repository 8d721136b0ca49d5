"""Define the cache objects that models get as ``past_key_values``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from agentmem.compaction.request import USUAL, Request
from agentmem.errors import CopyRefused, MemoryCapExceeded, UnsupportedGeneration
from agentmem.hf.forward_context import FRAME, refuse_in_forward
from agentmem.hf.support import refuse_training
from agentmem.memory.forwards import Arriving

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from transformers import PreTrainedModel

    from agentmem.engine import Engine
    from agentmem.memory.forwards import Adopt, Append, Packed, Scratch, Transient
    from agentmem.memory.memory import Event, Memory, Usage
    from agentmem.planning.pricing import Plan
    from agentmem.reporting.report import CompactionReport, RunReport


class _Layer(CacheLayerMixin):
    """One layer of a cache as transformers expects it; the keys and values are in the memory's slots, not here."""

    is_croppable = False

    def __init__(self, owner: CappedCache | TransientCache, window: int | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # transformers leaves it untyped
        self.owner, self.is_sliding, self.is_initialized = owner, window is not None, True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Do nothing, because the memory allocates its slots itself."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the new keys and values unchanged; agentmem's attention function appends them to the memory later."""
        frame = FRAME.get()
        if frame is None or frame.step is None:
            if isinstance(self.owner, CappedCache):
                self.owner.memory.open_or_raise()
            raise UnsupportedGeneration(FOREIGN)
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the size of the attention mask's key axis, and 0, the offset of its first column.

        The size is the number of columns fed so far plus the ``query_length`` new columns.
        """
        return self.owner.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        """Return the number of columns of ``input_ids`` fed so far, pads and compacted tokens included."""
        return self.owner.get_seq_length()

    def get_max_length(self) -> int:
        """Return -1, which tells transformers that there is no maximum length; compaction makes room when needed."""
        return -1


FOREIGN = (
    "this memory was passed to a model that it was not opened for; pass it to the model that was given to "
    "agentmem.capped, or open another memory for this one"
)


class TransientCache(Cache):
    """The ``past_key_values`` of a forward that a memory itself runs, such as a probe."""

    def __init__(self, step: Adopt | Transient | Scratch | Packed, windows: Sequence[int | None]) -> None:
        super().__init__(layers=[_Layer(self, window) for window in windows])
        self.step = step

    def get_seq_length(self, layer_idx: int = 0) -> int:  # noqa: ARG002  # transformers' signature
        """Return 0 as the number of earlier tokens; a forward with this cache gets its position ids as an argument."""
        return 0


class CappedCache(Cache):
    """A memory under a hard cap, as a transformers cache: pass it to the model as ``past_key_values``.

    ``get_seq_length()`` counts all columns of ``input_ids`` fed so far, pads and compacted tokens included, so that
    ``generate`` never feeds a token twice. Operations that reorder, repeat, select or remove stored tokens are refused;
    beam search, contrastive search and assisted decoding need them.
    """

    def __init__(self, engine: Engine, model: PreTrainedModel) -> None:
        """Wrap the memory of ``engine``, which was opened for ``model``; only :func:`attach` calls this."""
        super().__init__(layers=[_Layer(self, layer.window) for layer in engine.memory.shape.layers])
        self.engine, self.model, self._decoder = engine, model, model.get_decoder()

    @property
    def memory(self) -> Memory:
        """Return the wrapped memory, which holds the slots, the plan and the ledger."""
        return self.engine.memory

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Raise CopyRefused, because a memory cannot be copied by ``copy`` or pickled."""
        raise CopyRefused.of(self)

    # what happened

    @property
    def columns(self) -> int:
        """Return the number of columns of ``input_ids`` fed so far, pads and compacted tokens included."""
        return self.memory.progress.consumed.columns

    @property
    def plan(self) -> Plan:
        """Return the plan of the memory: how the cap is divided into slots and temporary bytes."""
        return self.memory.plan

    @property
    def compactions(self) -> tuple[CompactionReport, ...]:
        """Return the reports of all compactions so far, oldest first."""
        return tuple(self.memory.compactions)

    def report(self) -> RunReport:
        """Return a report of everything that the memory has done so far."""
        return self.memory.report()

    def usage(self) -> Usage:
        """Return the memory's current tokens, slots and bytes, each summed over the rows."""
        return self.memory.usage()

    def subscribe(self, callback: Callable[[Event], None]) -> None:
        """Call ``callback`` with every later event of the memory.

        The event is a Usage after each forward, and a report after each compaction or re-basing.
        """
        self.memory.subscribe(callback)

    def room(self, row: int = 0) -> int:
        """Return how many more tokens row ``row`` can append before it must be compacted; 0 if the row is full."""
        return (
            self.memory.sequences[row].room
            if self.memory.sequences
            else self.memory.plan.capacity - self.memory.plan.scratch
        )

    def compact(
        self, *, slots: int | None = None, focus: Sequence[int] = (), policy: str | None = None
    ) -> tuple[CompactionReport, ...]:
        """Compact every row to its target now; return one report per compacted row.

        Rows that hold no more slots than the target are not compacted.

        Args:
            slots: the average number of slots per KV head to keep between prefix and recent window, instead of the
                target.
            focus: the ids of a text that must stay recallable.
            policy: the name of one of the policies that the memory was opened with; the default is its main policy.

        Raises:
            SettingsRefused: the mode is ``"off"``, the memory was not opened with that policy, or the model does not
                know some ids of ``focus``.
            CompactionFailed: a compaction failed; see :class:`agentmem.compaction.run.SequenceCompaction`.
            UnsupportedGeneration: another thread runs this memory now, or the call comes from a hook of the model
                while a forward with this memory runs.

        """
        self.memory.shape.check_ids("compact's focus", focus)
        request = USUAL
        if slots is not None or focus or policy is not None:
            request = Request(slots, None, tuple(focus), None if policy is None else self.memory.named(policy))
        refuse_in_forward(self.memory, "compact")
        with self.memory.owner.take():
            reports = [self.engine.compact(sequence, request) for sequence in self.memory.sequences]
        return tuple(report for report in reports if report is not None)

    def peek(self, ids: Sequence[int], row: int = 0) -> torch.Tensor:
        """Return the model's logits for ``ids`` as if they followed row ``row``, without changing the memory.

        The result is ``[n, V]`` in the model's dtype; line ``i`` predicts the id after ``ids[i]``. Slots, scores,
        stored queries, ids and the random state stay as they are. As in every forward, the buffers of attention count
        under the cap as temporary bytes. The model's own activations do not count under the cap.

        Raises:
            MemoryClosed: the memory is closed, for example because its ``with`` block has ended.
            SettingsRefused: ``ids`` is empty, the model does not know some of them, or the row has read nothing yet.
            MemoryCapExceeded: ``ids`` is longer than ``chunk``, the number of tokens that the plan has room for.
            UnsupportedGeneration: another thread runs this memory now, or the call comes from a hook of the model
                while a forward with this memory runs.

        """
        self.memory.shape.check_ids("peek", ids)
        refuse_in_forward(self.memory, "peek")
        with self.memory.owner.take():
            return self.engine.peek(ids, row)

    def transcript(self, row: int = 0) -> list[int]:
        """Return all ids that row ``row`` has read so far, in order, without pads; compacted tokens are included."""
        return list(self.memory.sequences[row].ids) if self.memory.sequences else []

    def padded_transcripts(self) -> torch.Tensor:
        """Return the ids that each row has read so far, ``[rows, longest]``, left-padded with 0.

        This is what ``generate`` returns for a run that was stopped early.
        """
        longest = max((each.seen for each in self.memory.sequences), default=0)
        return torch.tensor([[0] * (longest - each.seen) + list(each.ids) for each in self.memory.sequences])

    # methods that transformers calls

    def get_seq_length(self, layer_idx: int = 0) -> int:  # noqa: ARG002  # transformers' signature
        """Return the number of columns fed so far; see :attr:`columns`.

        Raises:
            MemoryClosed: the memory is closed, for example because its ``with`` block has ended.

        """
        self.memory.open_or_raise()
        return self.columns

    def crop(self, tokens_to_remove: int) -> None:
        """Refuse to remove the last tokens of every row; transformers calls this method in assisted decoding.

        Raises:
            UnsupportedGeneration: always.

        """
        raise UnsupportedGeneration(
            f"crop({tokens_to_remove}): a compacted memory cannot take tokens back; use greedy decoding or sampling"
        )

    def activate_past_recording(self) -> None:
        """Refuse to record past states; raise UnsupportedGeneration.

        Assisted decoding would use such states to remove tokens again.
        """
        self.crop(0)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Refuse to reorder rows; transformers calls this method in beam search.

        Raises:
            UnsupportedGeneration: always.

        """
        raise UnsupportedGeneration(f"beam search reorders rows (beam_idx {list(beam_idx.shape)}); use num_beams=1")

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Refuse to repeat rows; transformers calls this method in contrastive search.

        Raises:
            UnsupportedGeneration: always.

        """
        raise UnsupportedGeneration(
            f"repeating every row {repeats} times in mid-run is not handled; batch the prompt instead"
        )

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Refuse to select rows; transformers calls this method in contrastive search.

        Raises:
            UnsupportedGeneration: always.

        """
        raise UnsupportedGeneration(
            f"selecting rows in mid-run ({list(indices.shape)}) is not handled; open a new memory"
        )

    def reset(self) -> None:
        """Refuse to be emptied, because a memory serves one conversation; raise UnsupportedGeneration."""
        raise UnsupportedGeneration("reset() is not handled; open a new memory with agentmem.capped(...)")

    @property
    def batchsize(self) -> int:
        """Return the number of rows, or -1 before the first forward."""
        return len(self.memory.sequences) or -1

    # during a forward

    def open_for(self, model: PreTrainedModel) -> None:
        """Check that this memory is open and was opened for ``model``, which must be in eval mode, its decoder too.

        Raises:
            MemoryClosed: the memory is closed, for example because its ``with`` block has ended.
            UnsupportedGeneration: the memory was opened for another model.
            UnsupportedModel: the model or its decoder is in training mode.

        """
        self.memory.open_or_raise()
        if model is not self.model:
            raise UnsupportedGeneration(FOREIGN)
        refuse_training(model)
        refuse_training(self._decoder)

    def begin(self, inputs: dict[str, Any]) -> Append:
        """Make room for the tokens of a forward and return the step that appends them to the memory.

        ``inputs`` are the arguments of the decoder's forward by name.

        Raises:
            MemoryCapExceeded: the forward has more tokens than the plan allows in one forward.
            UnsupportedGeneration: :func:`mask_columns` refuses the mask, or the forward has ``inputs_embeds`` without
                ids although the policy's probe needs ids.

        """
        count, most = size(inputs)[1], self.engine.most_tokens
        if count > most:
            raise MemoryCapExceeded(
                f"a forward of {count} tokens that wants every position's output cannot be cut, and at most {most} fit "
                f"at once (chunk={self.memory.plan.chunk}); pass logits_to_keep=1 and no output_hidden_states, feed "
                "fewer at once, or raise chunk"
            )
        self.memory.bind(size(inputs)[0])
        step = self.engine.begin(self._arriving(inputs))
        step.columns = count
        return step

    def _arriving(self, inputs: dict[str, Any]) -> list[Arriving]:
        rows, count = size(inputs)
        ids = self._ids(inputs, rows, count)
        places = inputs.get("position_ids")
        if places is None:
            positions = [list(range(self.columns, self.columns + count))] * rows
        else:
            positions = places.expand(rows, -1).tolist()
        mask = mask_columns(inputs, self.columns, count)
        if mask is None:
            return [Arriving(ids[row], positions[row], slice(None)) for row in range(rows)]
        return [_present(ids[row], positions[row], valid) for row, valid in enumerate(mask)]

    def moved(self, inputs: dict[str, Any]) -> dict[str, Any] | None:
        """Return a forward's arguments with the position ids of re-based rows moved down.

        ``None`` means that no row was re-based, so the arguments can be used as they are.
        """
        if not any(each.shift for each in self.memory.sequences):
            return None
        rows, count = size(inputs)
        places = inputs.get("position_ids")
        given = inputs.get("input_ids")
        device = (given if given is not None else inputs["inputs_embeds"]).device
        if places is None:
            places = torch.arange(self.columns, self.columns + count, device=device)[None]
        shifts = torch.tensor([[each.shift] for each in self.memory.sequences], device=device)
        return {**inputs, "position_ids": (places.expand(rows, -1) - shifts).clamp_(min=0)}

    def _ids(self, inputs: dict[str, Any], rows: int, count: int) -> list[list[int]]:
        given = inputs.get("input_ids")
        if given is not None:
            return given.tolist()  # type: ignore[no-any-return]  # given is Any
        if self.memory.policy.queries.probing:
            raise UnsupportedGeneration(
                f"inputs_embeds have no token ids to replay, which policy {self.memory.policy.name!r} needs; "
                "pass input_ids, or choose probe='live' or a policy without a probe"
            )
        return [[-1] * count for _ in range(rows)]


def size(inputs: dict[str, Any]) -> tuple[int, int]:
    """Return the numbers of rows and columns of a forward's ``input_ids`` or ``inputs_embeds``."""
    given = inputs.get("input_ids")
    shape = (given if given is not None else inputs["inputs_embeds"]).shape
    return int(shape[0]), int(shape[1])


def mask_columns(inputs: dict[str, Any], columns: int, count: int) -> list[list[bool]] | None:
    """Return for each row which of a forward's ``count`` new columns hold tokens, not pads.

    ``None`` means that the forward has no attention mask, so every column holds a token.

    Raises:
        UnsupportedGeneration: the mask is not 2-D, or does not have ``columns + count`` columns, where ``columns`` were
            fed before this forward.

    """
    mask = inputs.get("attention_mask")
    if mask is None:
        return None
    if not isinstance(mask, torch.Tensor) or mask.ndim != 2:  # noqa: PLR2004
        raise UnsupportedGeneration("attention_mask must be 2-D [batch, columns]; prepared 4-D masks are not handled")
    if mask.shape[1] != columns + count:
        raise UnsupportedGeneration(
            f"attention_mask has {mask.shape[1]} columns; it must cover the {columns} seen so far and the {count} new"
        )
    present: list[list[bool]] = mask[:, columns:].bool().tolist()
    return present


def _present(ids: list[int], positions: list[int], valid: list[bool]) -> Arriving:
    """Return the tokens of one row, leaving out the columns in which ``valid`` is false (pads)."""
    if all(valid):
        return Arriving(ids, positions, slice(None))
    columns = [column for column, present in enumerate(valid) if present]
    span = slice(columns[0], columns[-1] + 1) if columns else slice(0)
    if span.stop - (span.start or 0) == len(columns):  # no pads in between: views, where an index would copy
        return Arriving(ids[span], positions[span], span)
    return Arriving([ids[each] for each in columns], [positions[each] for each in columns], torch.tensor(columns))
