"""Run model forwards on behalf of memories.

Some of these forwards run several sequences, packed into one row. The others run one sequence: to read a probe, to run
tokens again, or to let the model write questions and summaries.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from agentmem.hf.cache import TransientCache
from agentmem.hf.forward_context import own_frame, require_all
from agentmem.hf.generate_checks import check_adapters
from agentmem.hf.support import input_device, refuse_training
from agentmem.memory.torch_state import callers_state

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedModel

    from agentmem.memory.forwards import Adopt, Packed, Scratch, Transient
    from agentmem.planning.model_shape import ModelShape


class ModelForwards:
    """The forwards of one attached model; implements :class:`agentmem.memory.forwards.Forwards`."""

    def __init__(self, model: PreTrainedModel, shape: ModelShape) -> None:
        """Store the model and the windows of its layers; run nothing."""
        self._model, self._windows = model, [layer.window for layer in shape.layers]

    def check(self) -> None:
        """Check that the model can be run now.

        Raises:
            UnsupportedModel: the model or its decoder is in training mode.

        """
        refuse_training(self._model)
        refuse_training(self._model.get_decoder())

    def run(self, ids: Sequence[int], start: int, step: Adopt | Transient) -> None:
        """Run the decoder over ``ids`` at positions ``start, start + 1, …``; ``step`` computes the attention."""
        self._forward(self._model.get_decoder(), ids, _from(start, ids), step)

    def next_logits(self, ids: Sequence[int], start: int, step: Scratch) -> torch.Tensor:
        """Run the whole model as :meth:`run` does; return the logits ``[V]`` of the next id, in the model's dtype."""
        logits: torch.Tensor = self._forward(self._model, ids, _from(start, ids), step, logits_to_keep=1).logits[0, -1]
        return logits

    def logits(self, ids: Sequence[int], start: int, step: Transient) -> torch.Tensor:
        """Run the whole model as :meth:`run` does; return the logits ``[n, V]`` after each id, in the model's dtype."""
        logits: torch.Tensor = self._forward(self._model, ids, _from(start, ids), step).logits[0]
        return logits

    def packed(self, ids: Sequence[int], positions: Sequence[int], ends: Sequence[int], step: Packed) -> torch.Tensor:
        """Run the whole model once over several sequences, whose ids are concatenated to one row.

        ``positions`` are those of each id in its own sequence. The result has the logits ``[n, V]`` after the ids at
        the indices ``ends``. Only attention may mix tokens in this model; see :func:`agentmem.hf.packs`.

        Raises:
            UnsupportedModel: some layer did not use the memories' attention.

        """
        if len(ids) > len(ends):  # not at every token, because it visits every module
            check_adapters(self._model)
        device = input_device(self._model)
        keep = torch.tensor(list(ends), device=device)
        output = self._forward(self._model, ids, positions, step, logits_to_keep=keep)
        require_all(step.attended, len(self._windows))
        logits: torch.Tensor = output.logits[0]
        return logits

    def _forward(
        self,
        module: Any,
        ids: Sequence[int],
        positions: Sequence[int],
        step: Adopt | Transient | Scratch | Packed,
        **more: Any,
    ) -> Any:
        device = input_device(module)
        refuse_training(module)
        # own_frame: an interrupt, which torch's hooks do not see, would leave its frame behind
        with callers_state(), own_frame(), torch.no_grad():
            return module(
                input_ids=torch.tensor([list(ids)], device=device),
                position_ids=torch.tensor([list(positions)], device=device),
                past_key_values=TransientCache(step, self._windows),
                use_cache=True,
                **more,
            )


def _from(start: int, ids: Sequence[int]) -> Sequence[int]:
    return range(start, start + len(ids))
