"""``agentmem eval fidelity``: compare next-token distributions under a cap with those of full memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
import typer

from agentmem import evaluation
from agentmem.cli.arguments import Chunk, Device, Probe, ProbeTokens, SlotNumbers, parse_target
from agentmem.cli.evaluate.one_shot import compare as compare_one_shot
from agentmem.cli.evaluate.one_shot import deliver as deliver_one_shot
from agentmem.cli.evaluate.options import (
    POLICIES,
    CacheDir,
    CacheLimit,
    CapBytes,
    Delivery,
    Fresh,
    JsonPath,
    Models,
    Plot,
    Policies,
    Slots,
    TextFiles,
    Work,
    bars,
    chosen,
    comparisons,
    each_once,
    kept_in,
    numbers,
    source_of,
    words,
)
from agentmem.cli.loading import Dtype, load_model
from agentmem.errors import SettingsRefused
from agentmem.evaluation import FidelityRow, Measurement, OneShotRow, Shot, Source, Terms
from agentmem.evaluation.fidelity import Medians, medians
from agentmem.evaluation.one_shot import KEEP_FIRST, KEEP_RECENT
from agentmem.evaluation.one_shot import cases as one_shot_cases
from agentmem.settings import parse_bytes


def fidelity(
    *,
    model: Models = None,
    text: TextFiles = None,
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
    cache_limit: CacheLimit = "16GiB",
    fresh: Fresh = False,
) -> None:
    """Stream a text through capped memory and compare with full memory: KL, ΔNLL, top-1 agreement, bytes, seconds.

    Give --slots, --cap, or both; the default is --slots 512. With several texts or offsets the last table has medians.
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
    specs, most = chosen(policies, terms), parse_bytes(cache_limit, "--cache-limit")
    texts = {path: words(path) for path in each_once(text)}
    if shot is not None:
        one_shot_cases(specs, terms, shot, tokens)
    limits = comparisons(terms, slots, cap)
    done: list[FidelityRow] = []
    shots: list[OneShotRow] = []
    try:
        for name in each_once(model):
            loaded, tokenizer = load_model(name, dtype, device)
            passages = [
                (source_of(name, path, said).model_copy(update={"offset": at}), said, at)
                for path, said in texts.items()
                for at in offsets
            ]
            read = [
                (source, evaluation.passage(tokenizer, said, offset=at, tokens=tokens)) for source, said, at in passages
            ]
            work = Work(loaded, tokenizer, specs, kept_in(cache_dir, "fidelity"), fresh, delivery, most)
            if shot is None:
                work.check_plans(limits)
                work.announce(tokens * len(read))
                _compare(work, read, limits, done)
            else:
                work.announce(len(read) * shot.continuation)
                compare_one_shot(work, read, terms, shot, shots)
    finally:  # after an error or Ctrl-C, the rows measured before are delivered too
        if done:
            _deliver(done, delivery)
        if shots:
            deliver_one_shot(shots, delivery)


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


def _compare(
    work: Work, passages: Sequence[tuple[Source, torch.Tensor]], limits: Sequence[Terms], done: list[FidelityRow]
) -> None:
    """Measure every passage of one model under every limit and add the rows to ``done``."""
    before, wanted = len(done), len(passages) * len(limits) * len(work.specs)
    try:
        for source, ids in passages:
            for terms in limits:
                _measure(work, source.model_copy(update={"settings": terms}), ids, done, several=len(passages) > 1)
    finally:
        work.note_missing(len(done) - before, wanted)


def _measure(work: Work, source: Source, ids: torch.Tensor, done: list[FidelityRow], *, several: bool) -> None:
    measured: list[Measurement] = []
    at = f" from {source.offset}" if several else ""
    try:
        with bars(len(ids) - 1, f", {source.limit}{at}") as progress:
            streamed = evaluation.stream(
                work.model,
                ids,
                work.specs,
                source.settings,
                tokenizer=work.tokenizer,
                cache_dir=work.folder,
                fresh=work.fresh,
                most_bytes=work.most_bytes,
                progress=progress,
            )
            for each in streamed:
                measured.append(each)  # noqa: PERF402  # what came before an error is kept
    finally:
        done += evaluation.rows(measured, source)


def _deliver(rows: Sequence[FidelityRow], delivery: Delivery) -> None:
    delivery.rows(rows)
    windows = _windows(rows)
    for window in windows:
        _show_window(window, rows, delivery)
    if len({(row.text_sha256, row.offset) for row in rows}) > 1:
        _show_medians(medians(rows), delivery)
    if any(row.drift for row in rows):
        _show_drift(medians(rows), delivery)
    if delivery.plot is not None:
        from agentmem.evaluation import pictures

        delivery.pictures(pictures.save(pictures.fidelity_figures(rows), delivery.plot))


def _windows(rows: Sequence[FidelityRow]) -> list[list[FidelityRow]]:
    """Group the rows that one table shows: those of a model and passage under one limit, or under one of each kind."""
    pair = len({row.limit for row in rows}) == len({row.equal for row in rows})
    found: dict[tuple[object, ...], list[FidelityRow]] = {}
    for row in rows:
        found.setdefault((row.model, row.text_sha256, row.offset, "" if pair else row.limit), []).append(row)
    return list(found.values())


def _show_window(window: Sequence[FidelityRow], rows: Sequence[FidelityRow], delivery: Delivery) -> None:
    """Print the table of a window; its title names what differs among all rows."""
    first = window[0]
    beside = {row.policy: row for row in window if row.equal != first.equal}
    columns = ["policy", "KL", "KL p95", "top-1", "ΔNLL", "compactions", "held a head", "R + T bytes", "seconds"]
    columns += ["s each", *(("KL at equal bytes", "slots") if beside else ())]
    lines = [
        [*_cells(row), *(_beside(beside.get(row.policy)) if beside else ())]
        for row in window
        if row.equal == first.equal
    ]
    parts = [f"equal {first.equal}", first.limit, f"{first.positions} positions past the cap"]
    parts += [f"from character {first.offset}"] if len({row.offset for row in rows}) > 1 else []
    parts += [first.text] if len({row.text_sha256 for row in rows}) > 1 else []
    parts += [first.model] if len({row.model for row in rows}) > 1 else []
    delivery.table(", ".join(parts), columns, lines)


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
    columns = ("policy", "model", "limit", "passages", "KL", "KL p95", "top-1", "ΔNLL", "s each")
    lines = [
        (
            each.policy,
            each.model,
            each.limit,
            str(each.windows),
            f"{each.kl_mean:.4f}",
            f"{each.kl_p95:.4f}",
            f"{each.top1:.3f}",
            f"{each.delta_nll:+.4f}",
            f"{each.seconds_each:.2f}",
        )
        for each in found
    ]
    delivery.table("medians over the passages", columns, lines, left=(0, 1, 2))


def _show_drift(found: Sequence[Medians], delivery: Delivery) -> None:
    """Print KL by number of compactions: one row per policy, one column per range such as 1–8 compactions."""
    groups = sorted({(group.first, group.last) for each in found for group in each.drift})
    lines = []
    for each in found:
        by_group = {(group.first, group.last): f"{group.kl_mean:.4f}" for group in each.drift}
        lines.append((each.policy, each.model, each.limit, *(by_group.get(group, "") for group in groups)))
    columns = ("policy", "model", "limit", *(f"{first}–{last}" for first, last in groups))
    delivery.table("drift: KL after so many compactions", columns, lines, left=(0, 1, 2))
