"""``agentmem eval recall``: plant facts in a text, and ask for them after many compactions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from agentmem import evaluation
from agentmem.cli.arguments import (
    Chunk,
    Device,
    KeepFirst,
    KeepRecent,
    Model,
    Probe,
    ProbeTokens,
    SlotNumbers,
    Target,
    parse_target,
)
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
    entries,
    kept_in,
    numbers,
    source_of,
    words,
)
from agentmem.cli.loading import Dtype, load_model
from agentmem.errors import SettingsRefused
from agentmem.evaluation import Document, FidelityRow, Quiz, Recalled, RecallRow, Source, Terms
from agentmem.evaluation.facts import DEPTHS, FORMATS
from agentmem.evaluation.recall import FULL, WINDOW, Score, rows, stream


def recall(
    *,
    model: Model = None,
    text: TextFile = None,
    offset: Annotated[int, typer.Option(min=0, help="Character at which the first document begins.")] = 0,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of a document, facts included.")] = 1710,
    slots: Slots = None,
    cap: CapBytes = None,
    policies: Policies = POLICIES,
    facts: Annotated[int, typer.Option(min=1, help="At least so many: one per depth in each document.")] = 40,
    formats: Annotated[str, typer.Option(help="Kinds of facts, comma-separated.")] = ",".join(FORMATS),
    depths: Annotated[
        str, typer.Option(help="Where facts begin, as fractions of a document, comma-separated.")
    ] = ",".join(map(str, DEPTHS)),
    keep_first: KeepFirst = 16,
    keep_recent: KeepRecent = 96,
    target: Target = "0.5",
    probe: Probe = None,
    probe_tokens: ProbeTokens = None,
    chunk: Chunk = 1024,
    slot_dtype: SlotNumbers = "auto",
    seed: Annotated[int, typer.Option(help="Seed of the facts and of the memory.")] = 0,
    dtype: Annotated[Dtype, typer.Option(help="Number format; auto is the checkpoint's own.")] = Dtype.AUTO,
    device: Device = "cpu",
    json_path: JsonPath = None,
    plot: Plot = None,
    fidelity_json: Annotated[
        Path | None,
        typer.Option(help="Rows of `eval fidelity --json`: draw recall against KL (--plot).", show_default=False),
    ] = None,
    cache_dir: CacheDir = None,
    fresh: Fresh = False,
) -> None:
    """Plant facts in a text, stream it through capped memory and ask for them: exact answers and log-probability.

    The column recovered is (policy - window) / (full - window); each name stands for a mean log-probability.
    The policy window drops old tokens, and full keeps all tokens; both are always measured.
    A stopped comparison goes on where it ended.
    """
    delivery = Delivery(json_path, plot)
    delivery.check()
    rows_beside = _fidelity(fidelity_json, plot)
    terms = Terms.of(
        keep_first=keep_first,
        keep_recent=keep_recent,
        target=parse_target(target),
        chunk=chunk,
        slot_dtype=slot_dtype,
        probe=probe,
        probe_tokens=probe_tokens,
        seed=seed,
    )
    kinds = entries(formats, "--formats")
    quiz = Quiz.of(tokens=tokens, facts=facts, depths=numbers(depths, "--depths", float), formats=kinds, seed=seed)
    specs, limits, said = chosen(policies, terms), comparisons(terms, slots, cap), words(text)
    if rows_beside is not None:
        _require_shared(rows_beside, limits, specs)
    loaded, tokenizer = load_model(model, dtype, device)
    documents = evaluation.documents(tokenizer, said, quiz, offset=offset, keep_first=keep_first)
    work = Work(loaded, tokenizer, specs, kept_in(cache_dir, "recall"), fresh, delivery)
    judged = [spec for spec in dict.fromkeys((WINDOW, *specs)) if spec != FULL]  # full memory has terms of its own
    work.check_plans(limits, judged)
    source = source_of(model, text, said).model_copy(update={"offset": offset})
    _compare(work, documents, [source.model_copy(update={"settings": each}) for each in limits], rows_beside)


def _fidelity(path: Path | None, plot: Path | None) -> tuple[FidelityRow, ...] | None:
    if path is None:
        return None
    if plot is None:
        raise SettingsRefused("--fidelity-json: a picture is drawn of it, so it needs --plot and a folder")
    from agentmem.evaluation import pictures

    return pictures.read_fidelity(path)


def _require_shared(fidelity: Sequence[FidelityRow], limits: Sequence[Terms], specs: Sequence[str]) -> None:
    from agentmem.evaluation import pictures

    planned = [(terms.limit, terms.policy(spec).name) for terms in limits for spec in (FULL, WINDOW, *specs)]
    pictures.require_shared(fidelity, planned)


def _compare(
    work: Work, documents: Sequence[Document], sources: Sequence[Source], fidelity: Sequence[FidelityRow] | None
) -> None:
    done: list[tuple[Source, list[Recalled]]] = []
    wanted = len(sources) * len(documents) * len({FULL, WINDOW, *work.specs})
    try:
        for source in sources:
            found: list[Recalled] = []
            done.append((source, found))
            with bars(sum(len(each.ids) for each in documents), f", {source.limit}") as progress:
                streamed = stream(
                    work.model,
                    documents,
                    work.specs,
                    source.settings,
                    tokenizer=work.tokenizer,
                    cache_dir=work.folder,
                    fresh=work.fresh,
                    progress=progress,
                )
                for each in streamed:
                    found.append(each)  # noqa: PERF402  # what came before an error is kept
    finally:
        table_rows = [
            row for source, found in done for row in rows(found, source.settings.equal, len(documents), source)
        ]
        if table_rows:
            _deliver(table_rows, fidelity, work.delivery)
        work.note_missing(sum(len(found) for _, found in done), wanted)


def _deliver(found: Sequence[RecallRow], fidelity: Sequence[FidelityRow] | None, delivery: Delivery) -> None:
    delivery.rows(found)
    for limit in dict.fromkeys(row.limit for row in found):
        same = [row for row in found if row.limit == limit]
        _show_rows(same, delivery)
        _show_groups("depth", {row.policy: row.by_depth for row in same}, delivery)
        _show_groups("format", {row.policy: row.by_format for row in same}, delivery)
        compacted = {row.policy: row.by_compactions for row in same if row.num_compactions}
        if compacted:
            _show_groups("compactions since the fact", compacted, delivery)
    if delivery.plot is not None:
        from agentmem.evaluation import pictures

        figures = {"recall": pictures.recall_figure(found)}
        if fidelity is not None:
            figures["kl-recall"] = pictures.trade_figure(found, fidelity)
        delivery.pictures(pictures.save(figures, delivery.plot))


def _show_rows(found: Sequence[RecallRow], delivery: Delivery) -> None:
    columns = ("policy", "exact", "log-prob", "per token", "recovered", "compactions", "held a head", "R + T bytes")
    lines = [
        (
            row.policy,
            f"{round(row.exact * row.facts)}/{row.facts}",
            f"{row.log_prob:.2f}",
            f"{row.log_prob_per_token:.2f}",
            _ratio(row),
            str(row.num_compactions),
            str(row.held),
            f"{row.bytes:,}",
            f"{row.seconds:.1f}",
            f"{row.seconds_each:.2f}",
        )
        for row in found
    ]
    title = f"equal {found[0].equal}, {found[0].limit}, {found[0].facts} facts in {found[0].documents} documents"
    delivery.table(title, (*columns, "seconds", "s each"), lines)


def _show_groups(title: str, groups: dict[str, dict[str, Score]], delivery: Delivery) -> None:
    """Print a row for each policy with the recovered fraction and the exact answers of each group of facts.

    ``title`` names how facts are grouped: by depth, by format, or by compactions.
    """
    keys = list(dict.fromkeys(key for group in groups.values() for key in group))
    keys.sort(key=lambda key: (0, float(key), "") if key[0].isdigit() else (1, 0.0, key))
    lines = [
        (policy, *(_score(group[key]) if key in group else "" for key in keys)) for policy, group in groups.items()
    ]
    delivery.table(f"recovered (exact), by {title}", ("policy", *keys), lines)


def _score(score: Score) -> str:
    return f"{_ratio(score)} ({round(score.exact * score.facts)}/{score.facts})"


def _ratio(score: Score) -> str:
    return "–" if score.recovered is None else f"{score.recovered:.2f}"
