"""``agentmem eval fidelity --one-shot``: compact a document once, then teacher-force its continuation."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from agentmem.cli.evaluate.options import Delivery, Work, bars
from agentmem.evaluation import OneShotRow, Shot, Source, Terms, one_shot
from agentmem.evaluation.one_shot import Medians, medians


def compare(
    work: Work, passages: Sequence[tuple[Source, torch.Tensor]], terms: Terms, shot: Shot, done: list[OneShotRow]
) -> None:
    """Measure every passage of one model and add the rows to ``done``; rows before an error or Ctrl-C are in it."""
    before = len(done)
    tokens = len(passages[0][1]) - 1
    cases = one_shot.cases(work.specs, terms, shot, tokens)
    for case in cases:
        if not isinstance(case.policy, str):  # a policy that cannot serve these terms is refused now, not minutes later
            case.terms.plan(work.model, case.policy, min_reclaim=1)
    wanted = len(passages) * len(cases)
    try:
        for source, ids in passages:
            with bars(tokens, f" from {source.offset}" if len(passages) > 1 else "") as progress:
                streamed = one_shot.stream(
                    work.model,
                    ids,
                    work.specs,
                    terms,
                    shot,
                    tokenizer=work.tokenizer,
                    cache_dir=work.folder,
                    source=source,
                    fresh=work.fresh,
                    most_bytes=work.most_bytes,
                    progress=progress,
                )
                for row in streamed:
                    done.append(row)  # noqa: PERF402  # what came before an error is kept
    finally:
        work.note_missing(len(done) - before, wanted)


def deliver(rows: Sequence[OneShotRow], delivery: Delivery) -> None:
    """Write and print all rows, with a table for each model, and draw them if the user asked for that."""
    delivery.rows(rows)
    by_model: dict[str, list[OneShotRow]] = {}
    for row in rows:
        by_model.setdefault(row.model, []).append(row)
    for model, group in by_model.items():
        first, passages = group[0], len({(row.text_sha256, row.offset) for row in group})
        title = f"one compaction of {first.document} tokens, {first.positions} positions behind it"
        title += f", medians over {passages} passages" if passages > 1 else ""
        title += f", {model}" if len(by_model) > 1 else ""
        columns = ("policy", "ratio", "slots", "KL", "KL p95", "top-1", "NLL", "ΔNLL", "s compacting")
        delivery.table(title, columns, map(_cells, medians(group)))
    if delivery.plot is not None:
        from agentmem.evaluation import pictures

        delivery.pictures(pictures.save({"one-shot": pictures.one_shot_figure(rows)}, delivery.plot))


def _cells(each: Medians) -> tuple[str, ...]:
    return (
        each.policy,
        "" if each.ratio is None else f"1/{each.ratio}",
        str(each.slots),
        f"{each.kl_mean:.4f}",
        f"{each.kl_p95:.4f}",
        f"{each.top1:.3f}",
        f"{each.nll:.4f}",
        f"{each.delta_nll:+.4f}",
        f"{each.compact_seconds:.2f}",
    )
