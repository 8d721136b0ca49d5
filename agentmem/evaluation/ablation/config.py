"""Define the configuration of an ablation; its fields are the keys of the YAML file.

An ablation measures a grid: every combination of the listed models, texts, policies, limits and other settings. An
*instrument* is a kind of measurement: fidelity, recall or a task. Every combination is measured by each chosen
instrument. One combination with one instrument is a *cell*.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, JsonValue, model_validator

from agentmem import plugins
from agentmem.errors import SettingsRefused
from agentmem.evaluation.facts import DEPTHS, FORMATS, Format, Quiz
from agentmem.evaluation.recall import FULL
from agentmem.evaluation.terms import Frozen
from agentmem.settings import Seed, SlotDtype, parse_bytes

PAGES = "pages"
"""The text that ships with the package."""
MAX_CELLS = 100_000


def _several(value: Any) -> Any:
    """Turn a single value into a tuple of one value; leave a list or tuple as it is."""
    return value if isinstance(value, list | tuple) else (value,)


def _different(values: tuple[Any, ...]) -> tuple[Any, ...]:
    if len(set(values)) < len(values):
        raise ValueError("an entry stands there twice; give different ones")
    return values


Several = (BeforeValidator(_several), AfterValidator(_different))


def _spec(text: str) -> str:
    made = plugins.policy(text)
    if made.name == FULL:
        raise SettingsRefused("full memory is measured wherever it is needed; leave it out of the policies")
    return text


def _text(value: Any) -> Any:
    return {"name": value} if value == PAGES else {"path": value} if isinstance(value, str) else value


class Text(Frozen):
    """A text that models read: a UTF-8 file or the pages that ship with the package, from character ``offset`` on."""

    name: str = ""
    path: Path | None = None
    """Path of the file, relative to the configuration's folder; ``None`` for the shipped pages."""
    offset: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _named(self) -> Self:
        if self.path is None and self.name not in {"", PAGES}:
            raise ValueError(f"the text {self.name!r} has no path; give one, or write {PAGES}")
        return self

    @property
    def label(self) -> str:
        """Return the name by which tables show the text: ``pages``, or ``novel.txt@5000`` if the offset is 5000."""
        name = self.name or (PAGES if self.path is None else self.path.name)
        return f"{name}@{self.offset}" if self.offset else name


class Fidelity(Frozen):
    """Settings of the instrument that measures KL from full memory; see :mod:`agentmem.evaluation.fidelity`."""

    tokens: int = Field(default=2048, ge=1)


class Recall(Frozen):
    """Settings of the instrument that measures the recall of planted facts; see :mod:`agentmem.evaluation.recall`.

    The seed of each cell determines the facts.
    """

    tokens: int = Field(default=1710, ge=1)
    facts: int = Field(default=40, ge=1)
    depths: tuple[float, ...] = DEPTHS
    formats: tuple[Format, ...] = FORMATS

    @model_validator(mode="after")
    def _possible(self) -> Self:
        self.quiz(0)
        return self

    def quiz(self, seed: int) -> Quiz:
        """Return the settings of the documents and facts for cells with the seed ``seed``."""
        return Quiz(tokens=self.tokens, facts=self.facts, depths=self.depths, formats=self.formats, seed=seed)


class TaskArguments(Frozen):
    """The name of a task in :mod:`agentmem.evaluation.tasks` and the arguments given to it.

    If ``seed`` is not among the arguments, the task uses the seed of the cell.
    """

    name: str
    arguments: dict[str, JsonValue]


def _tasks(tasks: dict[str, dict[str, JsonValue]]) -> dict[str, dict[str, JsonValue]]:
    if tasks:
        from agentmem.evaluation.tasks.run import check  # importing inspect_ai takes a second

        for name, arguments in tasks.items():
            try:
                check(name, arguments)
            except SettingsRefused as error:
                raise ValueError(f"{name}: {error}") from None
    return tasks


class Instruments(Frozen):
    """The chosen instruments (kinds of measurement), at least one, with their settings.

    An instrument is chosen by giving its settings; ``fidelity: {}`` chooses fidelity with the default settings.
    """

    fidelity: Fidelity | None = None
    recall: Recall | None = None
    tasks: Annotated[dict[str, dict[str, JsonValue]], AfterValidator(_tasks)] = Field(default={})
    """Arguments of each task by its name, as in ``many_shot: {words: 32}``."""

    @model_validator(mode="after")
    def _some(self) -> Self:
        if not self.chosen:
            raise ValueError("none is chosen; name at least one of fidelity, recall, tasks")
        return self

    @property
    def chosen(self) -> dict[str, Frozen]:
        """Return the settings of the chosen instruments by name: fidelity first, then recall, then the tasks."""
        own = {"fidelity": self.fidelity, "recall": self.recall}
        tasks = {name: TaskArguments(name=name, arguments=given) for name, given in self.tasks.items()}
        return {name: settings for name, settings in (own | tasks).items() if settings is not None}


Share = Annotated[float, Field(gt=0, lt=1)]
Bytes = Annotated[int, BeforeValidator(lambda value: parse_bytes(value, "cap"))]
Slots = Annotated[int, Field(ge=1)]
Tokens = Annotated[int, Field(ge=0)]
Spec = Annotated[str, AfterValidator(_spec)]


class Ablation(Frozen):
    """The configuration of an ablation.

    Every combination of one entry from each list is measured by every chosen instrument. Instead of a list of one
    value, the value alone may be given.
    """

    title: str = Field(default="Ablation", max_length=200)
    models: Annotated[tuple[str, ...], *Several, Field(min_length=1)] = ("default",)
    """Models, each given as ``default``, a folder, or a Hugging Face id.

    A folder that begins with ``./`` or ``../`` is relative to the configuration's folder.
    """
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: Annotated[str, Field(max_length=100)] = "cpu"
    """Device of the models; ``cuda`` gives every process of ``accelerate launch`` its own GPU."""
    threads: Annotated[int, Field(ge=1)] | None = None
    """Number of torch's threads; ``None`` does not change the number.

    The temporary bytes depend on the number of threads, and so does the number of slots under a cap. To compare results
    from several machines, set the same number on each.
    """
    policies: Annotated[tuple[Spec, ...], *Several, Field(min_length=1)]
    """Names of policies, or specs such as ``am-halving[selector=omp-fast]``: a name with changed options."""
    baseline: str | None = None
    """Policy that each other policy is compared with; ``None`` chooses the first policy."""
    caps: Annotated[tuple[Bytes, ...], *Several] = ()
    """Caps: limits of resident and temporary bytes together."""
    slots: Annotated[tuple[Slots, ...], *Several] = ()
    """Limits in slots per KV head without a limit in bytes; ``caps`` and ``slots`` may both be given."""
    keep_first: Annotated[tuple[Tokens, ...], *Several, Field(min_length=1)] = (16,)
    keep_recent: Annotated[tuple[Tokens, ...], *Several, Field(min_length=1)] = (96,)
    target: Annotated[tuple[int | float | str, ...], *Several, Field(min_length=1)] = (0.5,)
    slot_dtype: Annotated[tuple[SlotDtype, ...], *Several, Field(min_length=1)] = ("auto",)
    chunk: int = Field(default=1024, ge=1)
    texts: Annotated[tuple[Annotated[Text, BeforeValidator(_text)], ...], *Several, Field(min_length=1)] = (Text(),)
    seeds: Annotated[tuple[Seed, ...], *Several, Field(min_length=1)] = (0,)
    instruments: Instruments
    confidence: Share = 0.95
    resamples: int = Field(default=2000, ge=100, le=100_000)

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if not self.caps and not self.slots:
            raise ValueError("neither caps nor slots are given; write caps: [24MiB], or slots: [512]")
        if self.baseline is not None and self.baseline not in self.policies:
            raise ValueError(f"baseline: {self.baseline!r} is none of the policies: {', '.join(self.policies)}")
        return self

    @property
    def compared_with(self) -> str:
        """Return the baseline: the policy with which all others are compared."""
        return self.baseline or self.policies[0]


def limits(ablation: Ablation) -> Iterable[tuple[int | None, int | None]]:
    """Yield every limit of the grid as a pair (slots, bytes), one of which is ``None``."""
    yield from ((slots, None) for slots in ablation.slots)
    yield from ((None, cap) for cap in ablation.caps)
