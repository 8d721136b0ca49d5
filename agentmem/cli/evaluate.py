"""``agentmem eval``: what a policy costs, measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from agentmem import evaluation, models, plugins
from agentmem.cli.arguments import (
    Chunk,
    KeepFirst,
    KeepRecent,
    Model,
    Probe,
    ProbeTokens,
    Target,
    names,
    parse_target,
)
from agentmem.cli.console import ERR, OUT, STDOUT, note, require_writable, show, table, write_json
from agentmem.cli.loading import Dtype, load_model
from agentmem.evaluation import FidelityRow, Measurement, Terms
from agentmem.settings import parse_bytes

app = typer.Typer(help="Measure what a policy costs.", no_args_is_help=True)


@app.callback()
def group() -> None:
    """Measure what a policy costs."""


@app.command()
def fidelity(
    *,
    model: Model = None,
    text: Annotated[
        Path | None, typer.Option(help="A UTF-8 text; without it the shipped pages.", show_default=False)
    ] = None,
    offset: Annotated[int, typer.Option(min=0, help="Character at which to begin.")] = 0,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to stream.")] = 3072,
    slots: Annotated[
        int | None, typer.Option(min=1, help="Compare at this many slots per KV head.", show_default=False)
    ] = None,
    cap: Annotated[
        str | None, typer.Option(help="Compare at equal bytes, workspace included.", show_default=False)
    ] = None,
    policies: Annotated[str, typer.Option(help="Policies, comma-separated.")] = "window,heavy-hitters,am-halving",
    keep_first: KeepFirst = 16,
    keep_recent: KeepRecent = 96,
    target: Target = "0.5",
    probe: Probe = None,
    probe_tokens: ProbeTokens = None,
    chunk: Chunk = 1024,
    seed: Annotated[int, typer.Option(help="Seed of the memory.")] = 0,
    dtype: Annotated[Dtype, typer.Option(help="Number format; auto is the checkpoint's own.")] = Dtype.AUTO,
    json_path: Annotated[
        str | None, typer.Option("--json", help="Write the rows there; - is stdout.", show_default=False)
    ] = None,
    cache_dir: Annotated[
        Path | None, typer.Option(help="Where logits and finished rows are kept.", show_default=False)
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure again what was measured before.")] = False,
) -> None:
    """Stream a text through capped memory and compare with full memory: KL, ΔNLL, top-1 agreement, bytes, seconds.

    Give --slots, --cap, or both; without either --slots 512. A stopped comparison goes on where it ended.
    """
    if json_path not in (None, STDOUT):
        require_writable(Path(json_path), "--json")
    chosen = names(policies)
    for name in chosen:
        plugins.policy(name)
    words = evaluation.default_text() if text is None else evaluation.read_text(text)
    common = evaluation.Terms(
        keep_first=keep_first,
        keep_recent=keep_recent,
        target=parse_target(target),
        chunk=chunk,
        probe=probe,
        probe_tokens=probe_tokens,
        seed=seed,
    )
    comparisons = _comparisons(common, slots, cap)
    loaded, tokenizer = load_model(model, dtype)
    ids = evaluation.passage(tokenizer, words, offset=offset, tokens=tokens)
    folder = cache_dir or models.cache_home() / "fidelity"
    done: list[Measurement] = []
    try:
        for terms in comparisons:
            with _progress(tokens, terms) as progress:
                streamed = evaluation.stream(
                    loaded, ids, chosen, terms, tokenizer=tokenizer, cache_dir=folder, fresh=fresh, progress=progress
                )
                done.extend(streamed)
    finally:  # also what was measured before an error or Ctrl-C
        if done:
            _deliver(evaluation.rows(done), json_path)
        if len(done) < len(chosen) * len(comparisons):
            note(f"{len(done)} of {len(chosen) * len(comparisons)} rows were measured; the same command goes on there")


def _comparisons(common: Terms, slots: int | None, cap: str | None) -> list[Terms]:
    """Equal slots, equal bytes, or both; 512 slots without either."""
    found = []
    if slots is not None or cap is None:
        found.append(common.model_copy(update={"slots": slots or 512}))
    if cap is not None:
        found.append(common.model_copy(update={"cap_bytes": parse_bytes(cap)}))
    return found


def _deliver(rows: Sequence[FidelityRow], json_path: str | None) -> None:
    if json_path is not None:
        write_json([row.model_dump(mode="json") for row in rows], json_path, "--json")
    first = rows[0].equal
    beside = {row.policy: row for row in rows if row.equal != first}
    columns = ["policy", "KL", "KL p95", "top-1", "ΔNLL", "compactions", "held", "R + T bytes", "seconds"]
    columns += ["KL at equal bytes", "slots"] if beside else []
    lines = [[*_cells(row), *(_beside(beside.get(row.policy)) if beside else ())] for row in rows if row.equal == first]
    title = f"equal {first}, {rows[0].positions} positions past the cap"
    show(table(title, columns, lines, left=(0,)), on=ERR if json_path == STDOUT else OUT)


def _cells(row: FidelityRow) -> tuple[str, ...]:
    return (
        row.policy,
        f"{row.kl_mean:.4f}",
        f"{row.kl_p95:.4f}",
        f"{row.top1:.3f}",
        f"{row.delta_nll:+.4f}",
        str(row.num_compactions),
        str(row.held),
        f"{row.bytes:,}",
        f"{row.seconds:.1f}",
    )


def _beside(row: FidelityRow | None) -> tuple[str, str]:
    return ("", "") if row is None else (f"{row.kl_mean:.4f}", str(row.capacity))


@contextmanager
def _progress(tokens: int, terms: Terms) -> Iterator[Callable[[str, int], None]]:
    """A bar per policy on a terminal; nothing elsewhere."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    tasks: dict[str, TaskID] = {}
    with Progress(*columns, console=ERR, disable=not ERR.is_terminal, transient=True) as bars:

        def tell(name: str, done: int) -> None:
            if name not in tasks:
                tasks[name] = bars.add_task(f"{name}, equal {terms.equal}", total=tokens)
            bars.update(tasks[name], completed=done)

        yield tell
