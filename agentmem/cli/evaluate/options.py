"""Options that the commands of ``agentmem eval`` share, and helpers that parse them and deliver results."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TypeVar

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from agentmem import evaluation, models, plugins, specs
from agentmem.cli.console import ERR, OUT, STDOUT, note, require_folder, require_writable, show, table, write_json
from agentmem.errors import SettingsRefused
from agentmem.evaluation.full_logits import MOST_BYTES
from agentmem.evaluation.terms import Frozen, Source, Terms
from agentmem.settings import format_bytes, parse_bytes

DEFAULT_SLOTS = 512
POLICIES = "window,heavy-hitters,am-halving"

TextFile = Annotated[
    Path | None, typer.Option("--text", help="A UTF-8 text; without it the shipped pages.", show_default=False)
]
TextFiles = Annotated[
    list[Path] | None,
    typer.Option("--text", help="A UTF-8 text, or several; without it the shipped pages.", show_default=False),
]
Models = Annotated[
    list[str] | None,
    typer.Option("--model", help="Hugging Face id or folder, or several; without it the default.", show_default=False),
]
Slots = Annotated[
    str | None,
    typer.Option(help="Compare at this many slots per KV head; several, comma-separated.", show_default=False),
]
CapBytes = Annotated[
    str | None,
    typer.Option(
        "--cap", help="Compare at equal bytes, workspace included; several, comma-separated.", show_default=False
    ),
]
CacheLimit = Annotated[str, typer.Option(help="Most bytes of full memory's logits to keep there.")]
Policies = Annotated[
    str,
    # The backslash keeps rich from reading the options as markup.
    typer.Option(help="Policies, comma-separated, with options as in am-halving\\[steps=4]."),
]
JsonPath = Annotated[str | None, typer.Option("--json", help="Write the rows there; - is stdout.", show_default=False)]
Plot = Annotated[Path | None, typer.Option(help="Draw pictures into this folder.", show_default=False)]
CacheDir = Annotated[Path | None, typer.Option(help="Where logits and finished rows are kept.", show_default=False)]
Fresh = Annotated[bool, typer.Option("--fresh", help="Measure again what was measured before.")]

Number = TypeVar("Number", int, float)


def entries(text: str, option: str) -> tuple[str, ...]:
    """Return the entries of a comma-separated list.

    Raises:
        SettingsRefused: the list cannot be parsed.

    """
    try:
        return tuple(specs.entries(text, option))
    except ValueError as error:
        raise SettingsRefused(str(error)) from None


def numbers(text: str, option: str, kind: Callable[[str], Number]) -> tuple[Number, ...]:
    """Return the numbers of a comma-separated list.

    Raises:
        SettingsRefused: the list is empty; an entry is negative, occurs twice or is not a number of this kind.

    """
    parts = entries(text, option)
    try:
        found = tuple(map(kind, parts))
    except ValueError:
        raise SettingsRefused(f"{option}: {text!r} is no list of numbers; separate them by commas, as in 1,2") from None
    if not found or min(found) < 0 or len(set(found)) < len(found):
        raise SettingsRefused(f"{option}: {text!r} must name different numbers, none below 0, separated by commas")
    return found


def words(path: Path | None) -> str:
    """Return the text to stream: the text of the file ``path``, or the package's default text if ``path`` is None."""
    return evaluation.default_text() if path is None else evaluation.read_text(path)


def comparisons(common: Terms, slots: str | None, cap: str | None) -> list[Terms]:
    """Return the terms (settings) of each comparison: one for each number of slots, then one for each cap.

    Both are comma-separated lists. If neither is given, the only comparison is at :data:`DEFAULT_SLOTS` slots.

    Raises:
        SettingsRefused: a list cannot be read, is empty, or names a limit twice; a number is not positive.

    """
    found: list[dict[str, int]] = []
    if slots is not None or cap is None:
        found += [{"slots": count} for count in numbers(str(DEFAULT_SLOTS) if slots is None else slots, "--slots", int)]
    if cap is not None:
        found += [{"cap_bytes": parse_bytes(each, "--cap")} for each in entries(cap, "--cap")]
    if len({tuple(each.items()) for each in found}) < len(found):
        raise SettingsRefused(f"--cap: {cap!r} names a cap twice; leave one out")
    return [Terms.of(**{**common.model_dump(), **each}) for each in found]


Named = TypeVar("Named", str, Path)


def each_once(given: Sequence[Named] | None) -> list[Named | None]:
    """Return the models or texts that the user gave, each once; ``None``, the default, if there are none."""
    return list(dict.fromkeys(given)) if given else [None]


def source_of(model: str | None, text: Path | None, words: str) -> Source:
    """Return the source that rows name: the model, and the text with its hash."""
    name = models.DEFAULT.name if model is None else model
    sha256 = hashlib.sha256(words.encode()).hexdigest()
    return Source(model=name, text="shipped pages" if text is None else text.name, text_sha256=sha256)


def chosen(policies: str, terms: Terms) -> list[str]:
    """Return the specs (policy names with their options) that the option ``--policies`` lists.

    Every policy is made once, so that a wrong spec is refused before the model is loaded.
    """
    found = plugins.listed(policies)
    for spec in found:
        terms.policy(spec)
    return found


@dataclass(frozen=True)
class Delivery:
    """The destinations of results: rows go to a JSON file, tables to a console, pictures to a folder."""

    json_path: str | None
    plot: Path | None

    def check(self) -> None:
        """Check before a long computation that its results can be written.

        Raises:
            SettingsRefused: a file or folder cannot be written.

        """
        if self.json_path not in (None, STDOUT):
            require_writable(Path(str(self.json_path)), "--json")
        if self.plot is not None:
            require_folder(self.plot, "--plot")

    def rows(self, rows: Sequence[Frozen]) -> None:
        """Write the rows as JSON if the user gave ``--json``."""
        if self.json_path is not None:
            write_json([row.model_dump(mode="json") for row in rows], self.json_path, "--json")

    def table(
        self, title: str, columns: Sequence[str], lines: Iterable[Sequence[str]], *, left: Sequence[int] = (0,)
    ) -> None:
        """Print a table with its title to stdout, or to stderr if JSON goes to stdout."""
        console = ERR if self.json_path == STDOUT else OUT
        console.print(title, markup=False, soft_wrap=True)
        show(table(None, columns, lines, left=left), on=console)

    def pictures(self, paths: Sequence[Path]) -> None:
        """Print the paths of the drawn pictures."""
        for path in paths:
            note(f"picture {path}")


@dataclass(frozen=True)
class Work:
    """The model, policies and destinations that all comparisons of one command share."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    specs: Sequence[str]
    folder: Path
    """The folder that stores logits and finished measurements."""
    fresh: bool
    delivery: Delivery
    most_bytes: int = MOST_BYTES
    """The most bytes of logits that the folder keeps."""

    def announce(self, tokens: int) -> None:
        """Print where the logits of full memory over so many tokens are kept, and how many bytes they take."""
        size = 4 * tokens * int(self.model.config.get_text_config().vocab_size)
        note(
            f"logits of full memory: {format_bytes(size)} in {self.folder}, which keeps at most "
            f"{format_bytes(self.most_bytes)} (--cache-limit); `agentmem eval clean` deletes them"
        )

    def check_plans(self, limits: Iterable[Terms], specs: Iterable[str] | None = None) -> None:
        """Plan every policy under every limit, so that impossible combinations are refused before any measurement.

        Raises:
            SettingsRefused: a policy cannot work under one of the limits on this model.

        """
        chosen = self.specs if specs is None else tuple(specs)
        for terms in limits:
            for spec in chosen:
                terms.plan(self.model, terms.policy(spec))

    def note_missing(self, done: int, wanted: int) -> None:
        """If some rows are missing, print how many of the wanted rows were measured."""
        if done < wanted:
            note(f"{done} of {wanted} rows were measured; the same command goes on there")


def kept_in(cache_dir: Path | None, name: str) -> Path:
    """Return the folder for finished measurements: ``cache_dir``, or by default ``name`` in agentmem's cache folder."""
    return cache_dir or models.cache_home() / name


@contextmanager
def bars(total: int, suffix: str = "") -> Iterator[Callable[[str, int], None]]:
    """Yield a function that shows progress on a terminal, one bar per name; elsewhere the function shows nothing.

    The function takes the name of a bar and the number of units done. A bar is full at ``total`` units.
    """
    description = TextColumn("{task.description}", markup=False)  # a policy's options stand in brackets
    columns = (description, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    tasks: dict[str, TaskID] = {}
    with Progress(*columns, console=ERR, disable=not ERR.is_terminal, transient=True) as progress:

        def tell(name: str, done: int) -> None:
            if name not in tasks:
                tasks[name] = progress.add_task(name + suffix, total=total)
            progress.update(tasks[name], completed=done)

        yield tell
