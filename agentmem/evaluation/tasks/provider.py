"""Define the provider ``agentmem/MODEL`` for inspect_ai: a model in this process whose memory is capped.

    inspect eval agentmem/needle --model agentmem/default -M cap=24MiB -M policy=am-recall

The model arguments are ``cap`` (bytes) or ``slots``, ``policy``, ``keep_first``, ``keep_recent``, ``target``,
``chunk``, ``slot_dtype``, ``max_compactions``, ``dtype``, ``device`` and ``seed``. Without ``cap`` and ``slots``, the
model has full memory. The metadata of each output has the number of compactions, the peak bytes, and the tokens and
seconds of the reply.

A task can set how its messages are turned into a prompt, in ``extra_body`` of its ``GenerateConfig``; see
:class:`Reading` for the fields.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from typing import TYPE_CHECKING, Any

import torch
from inspect_ai.model import (
    ChatCompletionChoice,
    ChatMessageAssistant,
    GenerateConfig,
    ModelAPI,
    ModelInfo,
    ModelOutput,
    ModelUsage,
    modelapi,
    set_model_info,
)

from agentmem import models
from agentmem.errors import SettingsRefused
from agentmem.evaluation.tasks.generation import Forced, Reply, Sampling, Writer
from agentmem.evaluation.terms import Frozen, Terms
from agentmem.settings import SlotDtype, parse_bytes

if TYPE_CHECKING:
    from inspect_ai.model import ChatMessage
    from inspect_ai.tool import ToolChoice, ToolInfo
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_TERMS = ("slots", "keep_first", "keep_recent", "target", "chunk", "slot_dtype", "seed")


class Reading(Frozen):
    """Settings of how a task's messages are turned into a prompt and answered."""

    completion: bool = False
    """True if the texts of the messages are concatenated without a chat template."""
    shared: bool = False
    """True if the messages before the last are a shared context, which is read once for all questions about it."""
    forced: Forced | None = None
    """Settings of forcing an answer if the model does not end its reasoning; ``None`` forces no answer."""


class Arguments(Frozen):
    """The settings with which inspect_ai runs a model ``agentmem/MODEL``.

    On the command line, each setting is given to ``inspect eval`` as ``-M NAME=VALUE``.
    """

    cap: int | str | None = None
    slots: int | None = None
    policy: str = "am-halving"
    keep_first: int = 16
    keep_recent: int = 96
    target: int | float | str = 0.5
    chunk: int = 1024
    slot_dtype: SlotDtype = "auto"
    seed: int = 0
    max_compactions: int | None = None
    dtype: str = "auto"
    device: str | None = None

    def terms(self) -> Terms | None:
        """Return the settings of every memory; ``None`` means full memory.

        Raises:
            SettingsRefused: both ``cap`` and ``slots`` are given, or a value is not valid.

        """
        if self.cap is None and self.slots is None:
            return None
        if self.cap is not None and self.slots is not None:
            raise SettingsRefused(f"cap={self.cap} and slots={self.slots} are both given; give one of them")
        given = {name: getattr(self, name) for name in _TERMS}
        return Terms.of(**given, cap_bytes=None if self.cap is None else parse_bytes(self.cap, "cap"))


class CappedAPI(ModelAPI):
    """inspect_ai's interface to a model with a capped memory; samples are run one after the other."""

    def __init__(
        self,
        model_name: str,
        base_url: str | None = None,
        api_key: str | None = None,
        config: GenerateConfig = GenerateConfig(),  # noqa: B008  # inspect's signature
        *,
        loaded: tuple[PreTrainedModel, PreTrainedTokenizerBase] | None = None,
        **arguments: Any,
    ) -> None:
        super().__init__(model_name, base_url, api_key, config=config)
        self.arguments = Arguments.of(**arguments)
        terms = self.arguments.terms()
        if terms is not None:
            terms.policy(self.arguments.policy)  # an unknown policy is refused before the model is loaded
        model, self.tokenizer = loaded or models.load(model_name, **self._placement())
        # inspect_ai would load the model once more, only to look up these facts
        positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        set_model_info(f"agentmem/{model_name}", ModelInfo(model=model_name, context_length=positions))
        given = self.arguments
        self.writer = Writer(model, self.tokenizer, terms, given.policy, given.max_compactions, given.chunk)
        self._asked: Counter[str] = Counter()

    def _placement(self) -> dict[str, Any]:
        dtype = None if self.arguments.dtype == "auto" else getattr(torch, self.arguments.dtype, None)
        if self.arguments.dtype != "auto" and not isinstance(dtype, torch.dtype):
            raise SettingsRefused(f"dtype: {self.arguments.dtype!r} is no number format; give bfloat16 or float32")
        device = self.arguments.device
        if device == "cuda":
            device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        return {"dtype": dtype, "device_map": device}

    def max_connections(self) -> int:
        """Return 1, because calls run one after the other in this process."""
        return 1

    def close(self) -> None:
        """Close the memory of the shared context, if one is open."""
        self.writer.close()

    async def generate(
        self,
        input: list[ChatMessage],  # noqa: A002  # inspect's signature
        tools: list[ToolInfo],
        tool_choice: ToolChoice,  # noqa: ARG002  # the same
        config: GenerateConfig,
    ) -> ModelOutput:
        """Generate one reply to the messages ``input``; inspect_ai calls this for every sample.

        The call blocks the event loop, because the reply must be generated in the calling thread.
        """
        if tools:
            raise SettingsRefused(f"{len(tools)} tools: the provider agentmem has none; run the task without them")
        reading = Reading.of(**(config.extra_body or {}))
        if reading.shared:
            reply = self.writer.answer(*self._split(input, reading), self._sampling(config, ""))
        else:
            ids = self._ids(input, reading, end=True)
            digest = hashlib.sha256(repr(ids).encode()).hexdigest()
            reply = self.writer.reply(ids, self._sampling(config, digest), reading.forced)
        return self._output(reply, self.writer)

    def _sampling(self, config: GenerateConfig, digest: str) -> Sampling:
        """Return the sampling settings for a prompt with the hash ``digest``.

        The seed depends on the prompt and on the number of times that this prompt was asked before. Each epoch asks the
        same prompts again and therefore gets other random numbers. A repeated run gets the same numbers as the first.
        """
        epoch = self._asked[digest]
        self._asked[digest] += 1
        seed = self.arguments.seed if config.seed is None else config.seed
        mixed = hashlib.sha256(f"{seed}/{digest}/{epoch}".encode()).digest()
        given = {name: getattr(config, name) for name in ("max_tokens", "temperature", "top_p", "top_k")}
        return Sampling.of(
            **{name: value for name, value in given.items() if value is not None},
            seed=int.from_bytes(mixed[:6], "big"),
            stop=tuple(config.stop_seqs or ()),
        )

    def _split(self, messages: list[ChatMessage], reading: Reading) -> tuple[list[int], list[int]]:
        """Return the ids of all messages except the last, and the ids that the last message adds."""
        context, whole = self._ids(messages[:-1], reading, end=False), self._ids(messages, reading, end=True)
        if not context or whole[: len(context)] != context:
            raise SettingsRefused(
                "shared: with this model's chat template the ids of the context are no beginning of those of the whole "
                "conversation, so it cannot be read once; use completion"
            )
        return context, whole[len(context) :]

    def _ids(self, messages: list[ChatMessage], reading: Reading, *, end: bool) -> list[int]:
        if reading.completion:
            parts = [self.tokenizer(each.text, add_special_tokens=False, verbose=False) for each in messages]
            return [token for part in parts for token in part["input_ids"]]
        chat = [{"role": each.role, "content": each.text} for each in messages]
        found: Any = self.tokenizer.apply_chat_template(chat, add_generation_prompt=end, return_dict=False)
        return [int(token) for token in found]

    def _output(self, reply: Reply, writer: Writer) -> ModelOutput:
        facts = reply.model_dump(exclude={"text"})
        facts |= {"policy": "full" if writer.terms is None else writer.policy, "cap": self.arguments.cap}
        written = reply.tokens_generated
        return ModelOutput(
            model=self.model_name,
            choices=[
                ChatCompletionChoice(
                    message=ChatMessageAssistant(content=reply.text, source="generate"),
                    stop_reason="stop" if reply.stop == "end" else "max_tokens",
                )
            ],
            usage=ModelUsage(
                input_tokens=reply.tokens_read, output_tokens=written, total_tokens=reply.tokens_read + written
            ),
            time=reply.seconds,
            metadata=facts,
        )


@modelapi(name="agentmem")
def agentmem() -> type[ModelAPI]:
    """Return the class through which inspect_ai runs every model with a name ``agentmem/MODEL``."""
    return CappedAPI
