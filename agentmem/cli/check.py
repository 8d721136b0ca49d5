"""``agentmem check``: test if models of a family can be capped, without loading any weights."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from agentmem import hf, models
from agentmem.cli.console import STDOUT, note, show, table, write_json
from agentmem.errors import UnsupportedModel


def check(
    model: Annotated[
        str | None, typer.Argument(help="Hugging Face id or folder; without it the default model.", show_default=False)
    ] = None,
    *,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Run a tiny random model of a model's class beside stock transformers.

    The tiny model is run under a cap. As long as nothing is compacted, its logits must equal those of stock (unchanged)
    transformers. The exit code is 1 if models of this class cannot be capped.
    """
    report = hf.check(models.load_config(model))
    if as_json:
        write_json(asdict(report), STDOUT, "--json")
    elif report.checks:
        lines = [(each.name, _said(each)) for each in report.checks]
        show(table(report.family, ("what", "greatest difference"), lines, left=(0,)))
    if report.reason is not None:
        raise UnsupportedModel(f"model_type {report.family!r} cannot be capped: {report.reason}")
    if not as_json:
        note(f"model_type {report.family!r} can be capped ({report.seconds:.1f} s)")


def _said(check: hf.Check) -> str:
    return "as they must be" if check.difference is None else f"{check.difference:.1e}"
