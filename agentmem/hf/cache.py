"""Define the cache objects that models get as ``past_key_values``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from agentmem.compaction.request import USUAL, Request
from agentmem.errors import CopyRefused, MemoryCapExceeded, UnsupportedGeneration
from agentmem.hf.forward_context import FRAME
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
    """Present one layer of a memory to transformers. It holds no keys or values itself."""

    is_croppable = False

    def __init__(self, owner: CappedCache | TransientCache, window: int | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # transformers leaves it untyped
        self.owner, self.is_sliding, self.is_initialized = owner, window is not None, True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Do nothing, because the memory allocates its slots itself."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the new keys and values unchanged; the attention call that gets them appends them to the memory."""
        frame = FRAME.get()
        if frame is None or frame.step is None:
            if isinstance(self.owner, CappedCache):
                self.owner.memory.open_or_raise()
            raise UnsupportedGeneration(FOREIGN)
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the number of columns that a forward of ``query_length`` columns sees, and their offset 0."""
        return self.owner.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        """Return the number of columns fed so far: for each row of the batch, its tokens and pads together."""
        return self.owner.get_seq_length()

    def get_max_length(self) -> int:
        """Return -1, no maximum length, because compaction makes room."""
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
        """Return 0, because such a forward counts no earlier columns; its positions are passed explicitly."""
        return 0


class CappedCache(Cache):
    """A memory under a hard cap, in the form of a transformers cache to be passed as ``past_key_values``.

    ``get_seq_length()`` counts the columns of all ``input_ids`` fed so far, including pads and compacted tokens, so
    that ``generate`` never feeds a token twice. Beam search, cropping and recording of past states are refused.
    """

    def __init__(self, engine: Engine, model: PreTrainedModel) -> None:
        """Wrap the memory of ``engine``, opened for ``model``; :func:`attach` makes these objects."""
        super().__init__(layers=[_Layer(self, layer.window) for layer in engine.memory.shape.layers])
        self.engine, self.model = engine, model

    @property
    def memory(self) -> Memory:
        """Return the memory itself."""
        return self.engine.memory

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Refuse to be copied by ``copy`` or pickled."""
        raise CopyRefused.of(self)

    # what happened

    @property
    def columns(self) -> int:
        """Return the number of columns fed so far: for each row of the batch, its tokens and pads together."""
        return self.memory.progress.consumed.columns

    @property
    def plan(self) -> Plan:
        """Return the plan that was made for the cap."""
        return self.memory.plan

    @property
    def compactions(self) -> tuple[CompactionReport, ...]:
        """Return one report per compaction so far."""
        return tuple(self.memory.compactions)

    def report(self) -> RunReport:
        """Return a report of everything that the memory has done so far."""
        return self.memory.report()

    def usage(self) -> Usage:
        """Return the current bytes and slots of the memory, summed over rows."""
        return self.memory.usage()

    def subscribe(self, callback: Callable[[Event], None]) -> None:
        """Call ``callback`` with a Usage after every forward, and with a report after every compaction."""
        self.memory.subscribe(callback)

    def room(self, row: int = 0) -> int:
        """Return the number of tokens that a row can still append before it has to be compacted."""
        return (
            self.memory.sequences[row].room
            if self.memory.sequences
            else self.memory.plan.capacity - self.memory.plan.scratch
        )

    def compact(
        self, *, slots: int | None = None, focus: Sequence[int] = (), policy: str | None = None
    ) -> tuple[CompactionReport, ...]:
        """Compact every row down to the target now; rows below the target are left alone.

        Args:
            slots: slots per head to keep between prefix and recent window, instead of the target.
            focus: ids of a text that must stay recallable.
            policy: name of one of the policies that the memory was opened with; the default is its main policy.

        Raises:
            SettingsRefused: the mode is ``"off"``, or the memory was not opened with that policy.
            CompactionFailed: a compaction failed; see :class:`agentmem.compaction.run.SequenceCompaction`.

        """
        request = USUAL
        if slots is not None or focus or policy is not None:
            request = Request(slots, None, tuple(focus), None if policy is None else self.memory.named(policy))
        reports = (self.engine.compact(sequence, request) for sequence in self.memory.sequences)
        return tuple(report for report in reports if report is not None)

    def peek(self, ids: Sequence[int], row: int = 0) -> torch.Tensor:
        """Return the logits ``[n, V]`` of ``ids`` as a continuation of a row, without changing the memory.

        The logits are the model's own, in its dtype; line *i* predicts the id after ``ids[i]``. No slot, score, stored
        query, id or random state changes. As in every forward, the scratch of attention counts as temporary bytes (T),
        and the rest is the model's own activations (A).

        Raises:
            MemoryClosed: the memory's block has ended.
            SettingsRefused: ``ids`` is empty, or the row has read nothing yet.
            MemoryCapExceeded: ``ids`` is longer than ``chunk``; the plan has reserved scratch for no more.

        """
        return self.engine.peek(ids, row)

    def transcript(self, row: int = 0) -> list[int]:
        """Return the ids that a row has consumed, in order, without pads."""
        return list(self.memory.sequences[row].ids) if self.memory.sequences else []

    def padded_transcripts(self) -> torch.Tensor:
        """Return the consumed ids of all rows, ``[rows, columns]``, left-padded with 0: the result of a stopped run."""
        longest = max((each.seen for each in self.memory.sequences), default=0)
        return torch.tensor([[0] * (longest - each.seen) + list(each.ids) for each in self.memory.sequences])

    # methods that transformers calls

    def get_seq_length(self, layer_idx: int = 0) -> int:  # noqa: ARG002  # transformers' signature
        """Return the number of columns fed so far; see :attr:`columns`.

        Raises:
            MemoryClosed: the memory's block has ended.

        """
        self.memory.open_or_raise()
        return self.columns

    def crop(self, tokens_to_remove: int) -> None:
        """Refuse to remove tokens, as assisted decoding would.

        Raises:
            UnsupportedGeneration: always.

        """
        raise UnsupportedGeneration(
            f"crop({tokens_to_remove}): a compacted memory cannot take tokens back; use greedy decoding or sampling"
        )

    def activate_past_recording(self) -> None:
        """Refuse to record past states, which assisted decoding needs in order to remove tokens."""
        self.crop(0)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Refuse to reorder rows, as beam search would."""
        raise UnsupportedGeneration(f"beam search reorders rows (beam_idx {list(beam_idx.shape)}); use num_beams=1")

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Refuse to repeat rows, as contrastive search would."""
        raise UnsupportedGeneration(
            f"repeating every row {repeats} times in mid-run is not handled; batch the prompt instead"
        )

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Refuse to select rows, as contrastive search would."""
        raise UnsupportedGeneration(
            f"selecting rows in mid-run ({list(indices.shape)}) is not handled; open a new memory"
        )

    def reset(self) -> None:
        """Refuse to be reset, because a memory serves one conversation."""
        raise UnsupportedGeneration("reset() is not handled; open a new memory with agentmem.capped(...)")

    @property
    def batchsize(self) -> int:
        """Return the number of rows, or -1 before the first forward."""
        return len(self.memory.sequences) or -1

    # during a forward

    def open_for(self, model: PreTrainedModel) -> None:
        """Check that this memory is open and was opened for ``model``, which must be in eval mode.

        Raises:
            MemoryClosed: the memory's block has ended.
            UnsupportedGeneration: the memory was opened for another model.
            UnsupportedModel: the model is in training mode.

        """
        self.memory.open_or_raise()
        if model is not self.model:
            raise UnsupportedGeneration(FOREIGN)
        refuse_training(model)

    def refuse_pads_at_the_end(self, valid: Sequence[Sequence[bool]]) -> None:
        """Refuse rows that end with pads, because their next token would be predicted from a pad.

        Raises:
            UnsupportedGeneration: a row ends with a pad; the message names the first such row.

        """
        for index, row in enumerate(valid):
            seen = self.memory.sequences[index].seen if self.memory.sequences else 0
            if not row[-1] and (seen or any(row)):
                raise UnsupportedGeneration(
                    f"row {index} ends with a pad, and what follows is wanted of its last column; pad on the left "
                    "(tokenizer.padding_side='left')"
                )

    def begin(self, inputs: dict[str, Any]) -> Append:
        """Begin a forward with these arguments in the memory.

        Raises:
            MemoryCapExceeded: the forward has more tokens than the plan has reserved scratch for.
            UnsupportedGeneration: :func:`mask_columns` refuses the mask, or the forward has embeddings alone although
                the policy's probe needs ids.

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
        """Return the arguments with positions shifted for re-based rows, or ``None`` if no row was re-based."""
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
    """Return the numbers of rows and columns of a forward."""
    given = inputs.get("input_ids")
    shape = (given if given is not None else inputs["inputs_embeds"]).shape
    return int(shape[0]), int(shape[1])


def mask_columns(inputs: dict[str, Any], columns: int, count: int) -> list[list[bool]] | None:
    """Return for each row which of a forward's ``count`` columns hold tokens; ``None`` if there is no mask.

    Raises:
        UnsupportedGeneration: the mask is not 2-D, or does not cover the ``columns`` seen before and the new ones.

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
    """Return the tokens of one row without pads."""
    if all(valid):
        return Arriving(ids, positions, slice(None))
    columns = [column for column, present in enumerate(valid) if present]
    span = slice(columns[0], columns[-1] + 1) if columns else slice(0)
    if span.stop - (span.start or 0) == len(columns):  # no pads in between: views, where an index would copy
        return Arriving(ids[span], positions[span], span)
    return Arriving([ids[each] for each in columns], [positions[each] for each in columns], torch.tensor(columns))
