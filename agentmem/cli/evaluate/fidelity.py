"""``agentmem eval fidelity``: compare next-token distributions under a cap with those of full memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
import typer

from agentmem import evaluation
from agentmem.cli.arguments import Chunk, Device, Model, Probe, ProbeTokens, SlotNumbers, parse_target
from agentmem.cli.evaluate.one_shot import compare as compare_one_shot
from agentmem.cli.evaluate.options import (
    POLICIES,
    CacheDir,
    CapBytes,
    Delivery,
    Fresh,
    JsonPath,
    Plot,
    Policies,
    Slots,
    TextFile,
    Work,
    bars,
    chosen,
    comparisons,
    kept_in,
    numbers,
    words,
)
from agentmem.cli.loading import Dtype, load_model
from agentmem.errors import SettingsRefused
from agentmem.evaluation import FidelityRow, Measurement, Shot, Terms
from agentmem.evaluation.fidelity import Medians, medians
from agentmem.evaluation.one_shot import KEEP_FIRST, KEEP_RECENT
from agentmem.evaluation.one_shot import cases as one_shot_cases


def fidelity(
    *,
    model: Model = None,
    text: TextFile = None,
    offset: Annotated[str, typer.Option(help="Character at which to begin; several, comma-separated.")] = "0",
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to stream from each offset.")] = 3072,
    slots: Slots = None,
    cap: CapBytes = None,
    policies: Policies = POLICIES,
    keep_first: Annotated[
        int | None,
        typer.Option(min=0, help="First tokens that are never compacted: 16; one-shot: 4.", show_default=False),
    ] = None,
    keep_recent: Annotated[
        int | None,
        typer.Option(min=0, help="Last tokens that are never compacted: 96; one-shot: 8.", show_default=False),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(help="What a compaction leaves: a fraction (0.5), slots or bytes.", show_default=False),
    ] = None,
    probe: Probe = None,
    probe_tokens: ProbeTokens = None,
    chunk: Chunk = 1024,
    slot_dtype: SlotNumbers = "auto",
    seed: Annotated[int, typer.Option(help="Seed of the memory.")] = 0,
    one_shot: Annotated[
        bool, typer.Option("--one-shot", help="Compact a document once, then teacher-force its continuation.")
    ] = False,
    ratios: Annotated[
        str | None, typer.Option(help="One-shot: tokens per slot that is kept: 10,20,50,100.", show_default=False)
    ] = None,
    continuation: Annotated[
        int | None, typer.Option(min=1, help="One-shot: last tokens, teacher-forced: 256.", show_default=False)
    ] = None,
    dtype: Annotated[Dtype, typer.Option(help="Number format; auto is the checkpoint's own.")] = Dtype.AUTO,
    device: Device = "cpu",
    json_path: JsonPath = None,
    plot: Plot = None,
    cache_dir: CacheDir = None,
    fresh: Fresh = False,
) -> None:
    """Stream a text through capped memory and compare with full memory: KL, ΔNLL, top-1 agreement, bytes, seconds.

    Give --slots, --cap, or both; the default is --slots 512. With several offsets the last table has the medians.
    A stopped comparison goes on where it ended.
    """
    delivery = Delivery(json_path, plot)
    delivery.check()
    offsets = numbers(offset, "--offset", int)
    shot = _shot(one_shot, ratios, continuation, {"--slots": slots, "--cap": cap, "--target": target})
    first, recent = (KEEP_FIRST, KEEP_RECENT) if shot else (16, 96)
    terms = Terms.of(
        keep_first=first if keep_first is None else keep_first,
        keep_recent=recent if keep_recent is None else keep_recent,
        target=parse_target(target or "0.5"),
        chunk=chunk,
        slot_dtype=slot_dtype,
        probe=probe,
        probe_tokens=probe_tokens,
        seed=seed,
    )
    specs, source = chosen(policies, terms), words(text)
    if shot is not None:
        one_shot_cases(specs, terms, shot, tokens)
    limits = comparisons(terms, slots, cap)
    loaded, tokenizer = load_model(model, dtype, device)
    passages = {at: evaluation.passage(tokenizer, source, offset=at, tokens=tokens) for at in offsets}
    work = Work(loaded, tokenizer, specs, kept_in(cache_dir, "fidelity"), fresh, delivery)
    if shot is None:
        work.check_plans(limits)
        _compare(work, passages, limits)
    else:
        compare_one_shot(work, passages, terms, shot)


def _shot(wanted: bool, ratios: str | None, continuation: int | None, others: dict[str, object]) -> Shot | None:  # noqa: FBT001  # a command's flag
    """Return the one-shot settings if ``--one-shot`` was given (``wanted`` is true), else ``None``.

    ``others`` holds the options that have a meaning only without ``--one-shot``, by name.

    Raises:
        SettingsRefused: a value is wrong; with ``--one-shot``, an option in ``others`` was given; without it,
            ``ratios`` or ``continuation`` was given.

    """
    own = {"--ratios": ratios, "--continuation": continuation}
    strange = [name for name, value in (others if wanted else own).items() if value is not None]
    if strange:
        with_or_without = "with" if wanted else "without"
        raise SettingsRefused(f"{', '.join(strange)}: has no meaning {with_or_without} --one-shot; leave it out")
    if not wanted:
        return None
    given = {"ratios": ratios and numbers(ratios, "--ratios", int), "continuation": continuation}
    return Shot.of(**{name: value for name, value in given.items() if value is not None})


def _compare(work: Work, passages: dict[int, torch.Tensor], limits: Sequence[Terms]) -> None:
    done: dict[int, list[Measurement]] = {}
    wanted = len(passages) * len(limits) * len(work.specs)
    try:
        for offset, ids in passages.items():
            for terms in limits:
                at = f" from {offset}" if len(passages) > 1 else ""
                with bars(len(ids) - 1, f", equal {terms.equal}{at}") as progress:
                    streamed = evaluation.stream(
                        work.model,
                        ids,
                        work.specs,
                        terms,
                        tokenizer=work.tokenizer,
                        cache_dir=work.folder,
                        fresh=work.fresh,
                        progress=progress,
                    )
                    for each in streamed:
                        done.setdefault(offset, []).append(each)
    finally:  # after an error or Ctrl-C, the rows measured before are delivered too
        if done:
            _deliver({offset: evaluation.rows(each, offset=offset) for offset, each in done.items()}, work.delivery)
        work.note_missing(sum(map(len, done.values())), wanted)


def _deliver(windows: dict[int, tuple[FidelityRow, ...]], delivery: Delivery) -> None:
    rows = [row for window in windows.values() for row in window]
    delivery.rows(rows)
    for offset, window in windows.items():
        _show_window(window, f", from character {offset}" if len(windows) > 1 else "", delivery)
    if len(windows) > 1:
        _show_medians(medians(rows), delivery)
    if any(row.drift for row in rows):
        _show_drift(medians(rows), delivery)
    if delivery.plot is not None and any(row.num_compactions for row in rows):
        from agentmem.evaluation import pictures

        delivery.pictures(pictures.save({"drift": pictures.drift_figure(rows)}, delivery.plot))


def _show_window(rows: Sequence[FidelityRow], place: str, delivery: Delivery) -> None:
    first = rows[0].equal
    beside = {row.policy: row for row in rows if row.equal != first}
    columns = ["policy", "KL", "KL p95", "top-1", "ΔNLL", "compactions", "held", "R + T bytes", "seconds", "s each"]
    columns += ["KL at equal bytes", "slots"] if beside else []
    lines = [[*_cells(row), *(_beside(beside.get(row.policy)) if beside else ())] for row in rows if row.equal == first]
    title = f"equal {first}, {rows[0].positions} positions past the cap{place}"
    delivery.table(title, columns, lines)


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
        f"{row.seconds_each:.2f}",
    )


def _beside(row: FidelityRow | None) -> tuple[str, str]:
    return ("", "") if row is None else (f"{row.kl_mean:.4f}", str(row.capacity))


def _show_medians(found: Sequence[Medians], delivery: Delivery) -> None:
    columns = ("policy", "equal", "passages", "KL", "KL p95", "top-1", "ΔNLL", "s each")
    lines = [
        (
            each.policy,
            each.equal,
            str(each.windows),
            f"{each.kl_mean:.4f}",
            f"{each.kl_p95:.4f}",
            f"{each.top1:.3f}",
            f"{each.delta_nll:+.4f}",
            f"{each.seconds_each:.2f}",
        )
        for each in found
    ]
    delivery.table("medians over the passages", columns, lines, left=(0, 1))


def _show_drift(found: Sequence[Medians], delivery: Delivery) -> None:
    """Print KL by number of compactions: one row per policy, one column per range such as 1–8 compactions."""
    groups = sorted({(group.first, group.last) for each in found for group in each.drift})
    lines = []
    for each in found:
        by_group = {(group.first, group.last): f"{group.kl_mean:.4f}" for group in each.drift}
        lines.append((each.policy, each.equal, *(by_group.get(group, "") for group in groups)))
    columns = ("policy", "equal", *(f"{first}–{last}" for first, last in groups))
    delivery.table("drift: KL after so many compactions", columns, lines, left=(0, 1))
