"""``agentmem calibrate``: measure how many slots each head of a model needs, and write the results as a table."""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from transformers import PreTrainedTokenizerBase

from agentmem import calibration, evaluation, plugins
from agentmem.calibration import Method, Origin, Terms
from agentmem.cli.arguments import Device, KeepFirst, KeepRecent, Model
from agentmem.cli.console import ERR, require_writable, show, table
from agentmem.cli.loading import Dtype, load_model
from agentmem.errors import SettingsRefused
from agentmem.models import DEFAULT

_SHOWN = 5
_PAGES = "the shipped pages"


def calibrate(
    *,
    out: Annotated[Path, typer.Option(help="The table to write.", show_default=False)],
    model: Model = None,
    method: Annotated[
        Method, typer.Option(help="attention: seconds a window; fisher: a minute, better; loss: exact, an hour.")
    ] = "fisher",
    text: Annotated[
        Path | None, typer.Option(help="A UTF-8 text; without it the shipped pages.", show_default=False)
    ] = None,
    offset: Annotated[int, typer.Option(min=0, help="Character at which to begin.")] = 0,
    tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens to read; without it, all.", show_default=False)
    ] = None,
    context: Annotated[int, typer.Option(min=1, help="Tokens of a window's context.")] = Terms.context,
    ahead: Annotated[int, typer.Option(min=1, help="Tokens behind it that losses are measured on.")] = Terms.ahead,
    keep_first: KeepFirst = Terms.keep_first,
    keep_recent: KeepRecent = Terms.keep_recent,
    samples: Annotated[int, typer.Option(min=1, help="fisher: next tokens drawn at a position.")] = Terms.samples,
    policy: Annotated[str, typer.Option(help="fisher, loss: whose compactor is measured.")] = Terms.policy,
    seed: Annotated[int, typer.Option(help="Seed of what is drawn.")] = 0,
    dtype: Annotated[Dtype, typer.Option(help="Number format; auto is the checkpoint's own.")] = Dtype.AUTO,
    device: Device = "cpu",
    fresh: Annotated[bool, typer.Option("--fresh/--resume", help="Measure again what was measured before.")] = False,
) -> None:
    """Measure how many slots each head needs, and write a table for the calibrated and sensitivity budgets.

    A stopped calibration goes on where it was. The processes of `torchrun` or `accelerate launch` share the work.
    """
    terms = Terms(
        method=method,
        context=context,
        ahead=ahead,
        keep_first=keep_first,
        keep_recent=keep_recent,
        samples=samples,
        policy=policy,
        seed=seed,
    )
    plugins.policy(policy)
    require_writable(out, "--out")
    words = evaluation.default_text() if text is None else evaluation.read_text(text)
    loaded, tokenizer = load_model(model, dtype, device)
    ids = _ids(tokenizer, words[offset:], tokens).to(loaded.device)
    origin = Origin(
        text=_PAGES if text is None else text.name,
        sha256=hashlib.sha256(words.encode()).hexdigest(),
        offset=offset,
        tokens=len(ids),
        command=_command(model, text, tokens, offset, out, terms),
    )
    name = DEFAULT.name if model in (None, "default") else Path(model).name
    with _progress(method) as progress:
        found = calibration.calibrate(loaded, ids, terms, origin, name=name, out=out, fresh=fresh, progress=progress)
    if calibration.Team.joined().rank == 0:
        _deliver(found, out)


def _ids(tokenizer: PreTrainedTokenizerBase, text: str, tokens: int | None) -> torch.Tensor:
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.int64)
    if tokens is not None and len(ids) < tokens:
        raise SettingsRefused(f"text: it has {len(ids)} tokens, fewer than --tokens {tokens}; lower it")
    return ids[:tokens]


def _command(model: str | None, text: Path | None, tokens: int | None, offset: int, out: Path, terms: Terms) -> str:
    """Return the command that makes the table again; the table records this command.

    The command has all options that differ from their defaults; paths are reduced to file names.
    """
    words = ["agentmem", "calibrate", "--method", terms.method]
    given = {"model": model, "text": text and text.name, "tokens": tokens, "offset": offset or None}
    usual = Terms()
    for name in ("context", "ahead", "keep_first", "keep_recent", "samples", "policy", "seed"):
        given[name] = None if getattr(terms, name) == getattr(usual, name) else getattr(terms, name)
    for name, value in given.items():
        if value is not None:
            words += [f"--{name.replace('_', '-')}", str(value)]
    return shlex.join([*words, "--out", out.name])


def _deliver(found: dict[str, Any], out: Path) -> None:
    heads = [(share, layer, head) for layer, shares in enumerate(found["shares"]) for head, share in enumerate(shares)]
    heads.sort(reverse=True)
    chosen = [*heads[:_SHOWN], *heads[-_SHOWN:]] if len(heads) > 2 * _SHOWN else heads
    lines = [(str(layer), str(head), f"{share:.2f}") for share, layer, head in chosen]
    top = sum(share for share, *_ in heads[: max(1, len(heads) // 10)]) / sum(share for share, *_ in heads)
    show(table(None, ("compacted layer", "KV head", "equal shares"), lines, left=()))
    typer.echo(f"the top tenth of {len(heads)} heads gets {top:.0%} of the slots")
    typer.echo(f"table: {out}")


@contextmanager
def _progress(method: str) -> Iterator[Callable[[int, int], None]]:
    """Yield a function that shows progress as a bar on a terminal, and shows nothing elsewhere."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=ERR, disable=not ERR.is_terminal, transient=True) as bars:
        task: TaskID = bars.add_task(method, total=None)

        def tell(done: int, units: int) -> None:
            bars.update(task, completed=done, total=units)

        yield tell
