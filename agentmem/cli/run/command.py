"""``agentmem run``: generate under a cap, and show that the cap was kept."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from agentmem import plugins
from agentmem.cli.arguments import (
    Cap,
    Chunk,
    Device,
    KeepFirst,
    KeepRecent,
    Model,
    PolicyName,
    Probe,
    ProbeTokens,
    Rebase,
    SlotNumbers,
    Target,
    Temperature,
    parse_target,
    policy_options,
)
from agentmem.cli.console import ERR, OUT, STDOUT, require_folder, require_writable, show, write_json
from agentmem.cli.loading import Dtype, load_model
from agentmem.cli.run.comparison import Job
from agentmem.cli.run.generation import Sampling
from agentmem.cli.run.outcome import Outcome
from agentmem.cli.run.prompt import encode, read_prompt
from agentmem.errors import SettingsRefused
from agentmem.reporting.plots import draw
from agentmem.settings import Settings


def run(
    *,
    source: Annotated[str | None, typer.Argument(metavar="[-]", help="- reads the prompt from stdin.")] = None,
    model: Model = None,
    cap: Cap = "24MiB",
    policy: PolicyName = "am-halving",
    prompt: Annotated[str | None, typer.Option(help="The prompt; - reads stdin.", show_default=False)] = None,
    prompt_file: Annotated[str | None, typer.Option(help="A UTF-8 file; - reads stdin.", show_default=False)] = None,
    raw: Annotated[bool, typer.Option("--raw", help="No chat template: the model continues the prompt.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate at most.")] = 1024,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on to the last token whatever comes.")] = False,
    keep_first: KeepFirst = 16,
    keep_recent: KeepRecent = 96,
    target: Target = "0.5",
    probe: Probe = None,
    probe_tokens: ProbeTokens = None,
    chunk: Chunk = 1024,
    slot_dtype: SlotNumbers = "auto",
    rebase: Rebase = False,
    temperature: Temperature = 0.0,
    top_p: Annotated[float, typer.Option(min=1e-6, max=1.0, help="Nucleus of the sampling.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of the sampling and of the memory.")] = 0,
    dtype: Annotated[Dtype, typer.Option(help="Number format; auto is the checkpoint's own.")] = Dtype.AUTO,
    device: Device = "cpu",
    json_path: Annotated[
        str | None, typer.Option("--json", help="Write the report there; - is stdout.", show_default=False)
    ] = None,
    trace: Annotated[
        Path | None, typer.Option(help="Write every event there, as JSON lines.", show_default=False)
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw pictures into this folder.", show_default=False)] = None,
    compare_full: Annotated[bool, typer.Option("--compare-full", help="Run full memory as well and compare.")] = False,
) -> None:
    """Generate text while the KV memory stays under a hard cap."""
    text = read_prompt(prompt, prompt_file, source)
    if json_path not in (None, STDOUT):
        require_writable(Path(json_path), "--json")
    if plot is not None:
        require_folder(plot, "--plot")
    settings: dict[str, object] = {
        "keep_first": keep_first,
        "keep_recent": keep_recent,
        "target": parse_target(target),
        "chunk": chunk,
        "slot_dtype": slot_dtype,
        "rebase": rebase,
        "seed": seed,
    }
    options = policy_options(probe, probe_tokens)
    _refuse_early(cap, policy, options, settings)
    loaded, tokenizer = load_model(model, dtype, device)
    ids = encode(tokenizer, text, raw=raw)
    sampling = Sampling(max_new_tokens, temperature, top_p, seed, ignore_eos)
    job = Job(loaded, tokenizer, ids, sampling, cap, policy, options, settings, json_path != STDOUT, trace)
    outcome = job.execute()
    if compare_full and outcome.generated.finish in ("length", "eos"):
        outcome.full = job.compare(outcome)
    _deliver(outcome, json_path, trace, plot)


def _refuse_early(cap: str, policy: str, options: dict[str, object], settings: dict[str, object]) -> None:
    """Check the policy and the settings before the model is loaded, because loading takes seconds."""
    plugins.policy(policy, **options)
    Settings.of(cap=cap, **settings)


def _deliver(outcome: Outcome, json_path: str | None, trace: Path | None, plot: Path | None) -> None:
    """Write all results, even if the run ended early; then raise the error that ended the run, if any."""
    written: list[tuple[str, Path | str]] = []
    failure = outcome.error
    if plot is not None:
        try:
            outcome.pictures = draw(outcome.trace, plot)
        except SettingsRefused as error:  # if drawing fails, the report and the table are still written
            failure = failure or error
        written += [("picture", path) for path in outcome.pictures]
    if trace is not None:
        written.append(("trace", trace))
    if json_path is not None:
        write_json(outcome.as_json(), json_path, "--json")
        if json_path != STDOUT:
            written.append(("report", json_path))
    console = ERR if json_path == STDOUT else OUT
    console.print()
    show(outcome.table(written), on=console)
    if failure is not None:
        raise failure
    if outcome.interrupted:
        raise KeyboardInterrupt
