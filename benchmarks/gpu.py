"""All that is to be measured on one GPU, in parts of bounded time: a file of JSON and a table in Markdown.

    python -m benchmarks.gpu [--out build/gpu] [--parts decode peak]
    python -m benchmarks.gpu --reduced      # every part on the CPU with a tiny model, to test this script

Models are random and bfloat16, in the shapes of Qwen3-1.7B and Qwen3-8B, so no network is needed. Each part has a limit
of seconds; a part that fails or takes longer is written into the table with its reason, and the next one runs. The
files are written after each part. ``peak`` is the allocator's: ``torch.cuda.max_memory_allocated`` of a capped
``generate`` above that of a plain forward of one chunk, where what is kept between calls is taken off both.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import signal
import statistics
import sys
import time
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import DynamicCache

import agentmem
from agentmem import models, plugins
from agentmem.settings import parse_bytes
from agentmem.testing import peak_allocated, tiny_model
from benchmarks.decode import STEPS, feed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from agentmem.sessions import Session

Row = dict[str, object]
GREEDY: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
SHAPES: dict[str, dict[str, int]] = {
    "1.7B": {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16},
    "8B": {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32},
}
WHOLE = {"num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "max_position_embeddings": 131072}


@dataclass(frozen=True)
class Scale:
    """The sizes of one run: those of a GPU, or reduced ones."""

    device: str
    dtype: torch.dtype
    shapes: tuple[str, ...]
    held: tuple[int, ...]
    seen: int
    cap: str
    """Of the long run, the presets' peaks and the tokens below the cap."""
    sessions: tuple[int, ...]
    prompt: int
    """Tokens of the presets' prompts; more than the cap holds."""
    presets: tuple[str, ...] = ()
    """Whose peaks are measured; none: all that are installed."""

    def model(self, shape: str) -> Any:
        """A random model on the device; ``tiny`` is a shape, too."""
        return _model(shape, self.device, self.dtype)


FULL = Scale("cuda", torch.bfloat16, ("1.7B", "8B"), (1024, 4096, 32768), 100_000, "1GiB", (1, 8, 32), 12_000)
REDUCED = Scale("cpu", torch.float32, ("tiny",), (256,), 1500, "1MiB", (1, 3), 1400, ("am-halving", "window"))


@cache
def _model(shape: str, device: str, dtype: torch.dtype) -> Any:
    sizes: dict[str, Any] = {"max_position_embeddings": 16384}
    if shape != "tiny":
        sizes = {**WHOLE, **SHAPES[shape], "initializer_range": 0.02}
    with torch.device(device):
        return tiny_model("qwen3", dtype=dtype, **sizes)


def tokenizer() -> Any:
    """A tokenizer of single digits, for policies and sessions that ask for one."""
    from tokenizers import Tokenizer
    from tokenizers import models as kinds
    from transformers import PreTrainedTokenizerFast

    words = {"<unk>": 0, **{str(digit): digit + 1 for digit in range(10)}}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(kinds.WordLevel(words, unk_token="<unk>")),  # noqa: S106  # no password
        unk_token="<unk>",  # noqa: S106
    )


def ids_of(model: Any, count: int, seed: int = 0) -> torch.Tensor:
    """Deterministic ids ``[1, count]`` on the model's device."""
    drawn = torch.randint(1, model.config.vocab_size, (1, count), generator=torch.Generator().manual_seed(seed))
    return drawn.to(model.device)


def wait(device: torch.device) -> None:
    """Until the device has done what was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(device: torch.device, call: Callable[[], object]) -> float:
    """Seconds of a call, the device's work included."""
    wait(device)
    began = time.perf_counter()
    call()
    wait(device)
    return time.perf_counter() - began


def peak_of(device: torch.device, call: Callable[[], object]) -> int:
    """The most bytes that a call had allocated on the device at one moment."""
    if device.type != "cuda":
        return peak_allocated(call)
    gc.collect()
    wait(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    wait(device)
    return torch.cuda.max_memory_allocated(device) - before


def equal_tokens(scale: Scale) -> Iterator[Row]:
    """Greedy tokens below the cap against stock ``generate``."""
    for shape in scale.shapes:
        model = scale.model(shape)
        ids = ids_of(model, 48)
        expected = model.generate(ids, max_new_tokens=32, **GREEDY)
        with agentmem.capped(model, cap=scale.cap) as memory:
            found = model.generate(ids, past_key_values=memory, max_new_tokens=32, **GREEDY)
        same = int((expected == found).cumprod(-1).sum()) - 48 if expected.shape == found.shape else 0
        yield {"name": shape, "tokens": 32, "equal until": same}


def peaks(scale: Scale) -> Iterator[Row]:
    """The peak above a plain chunk's forward, for every preset, against the cap."""
    model, words, cap = scale.model(scale.shapes[0]), tokenizer(), parse_bytes(scale.cap)
    ids = ids_of(model, scale.prompt)
    for name in scale.presets or sorted(plugins.names()):
        yield {"name": name, **_peak(model, words, ids, name, cap)}


def _peak(model: Any, words: Any, ids: torch.Tensor, policy: str, cap: int) -> Row:
    compactions = []

    def run() -> None:
        with agentmem.capped(model, words, cap=cap, policy=policy) as memory:
            model.generate(ids, past_key_values=memory, max_new_tokens=2, **GREEDY)
            compactions.append(memory.report().num_compactions)

    try:
        chunk = agentmem.plan(model, words, cap=cap, policy=policy).chunk
        capped = peak_of(model.device, run)
    except agentmem.AgentmemError as refusal:
        return {"refused": str(refusal)[:120]}
    with torch.inference_mode():
        plain = peak_of(model.device, lambda: model(input_ids=ids[:, :chunk], use_cache=False, logits_to_keep=1))
    return {
        "cap": cap, "peak above a chunk": capped - plain, "within": capped - plain <= cap,
        "compactions": compactions[0],
    }  # fmt: skip


def decode(scale: Scale) -> Iterator[Row]:
    """A decode step of a memory that holds as many slots as a stock cache, in turns; medians."""
    for shape in scale.shapes:
        model = scale.model(shape)
        for held in scale.held:
            yield {"name": f"{shape}, {held} held", **_step(model, held)}


def _step(model: Any, held: int) -> Row:
    token, ids = ids_of(model, 1), ids_of(model, held)
    other = DynamicCache(config=model.config)
    times: dict[str, list[float]] = {"agentmem": [], "stock": []}
    with ExitStack() as stack, torch.inference_mode():
        memory = stack.enter_context(
            agentmem.capped(model, cap="64GiB", policy="window", max_slots=held + STEPS + 16, chunk=512)
        )
        caches = {"agentmem": memory, "stock": other}
        for each in caches.values():
            feed(model, each, ids)
        for count in range(STEPS + 3):
            for name, each in caches.items():
                taken = timed(
                    model.device, lambda each=each: model(input_ids=token, past_key_values=each, use_cache=True)
                )
                times[name] += [1000 * taken] * (count >= 3)
    ours, stock = (statistics.median(times[name]) for name in ("agentmem", "stock"))
    return {"ms": round(ours, 3), "stock ms": round(stock, 3), "ratio": round(ours / stock, 3)}


def long_run(scale: Scale) -> Iterator[Row]:
    """Many tokens read at a fixed cap: seconds of compactions and their share of the run."""
    model = scale.model(scale.shapes[0])
    for policy in ("window", "am-halving"):
        with agentmem.capped(model, cap=scale.cap, policy=policy) as memory:
            seconds = timed(model.device, lambda memory=memory: feed(model, memory, ids_of(model, scale.seen)))
            report = memory.report()
        yield {
            "name": policy, "tokens": scale.seen, "cap": scale.cap, "seconds": round(seconds, 2),
            "compactions": report.num_compactions, "compacting s": round(report.seconds_compacting, 2),
            "share": round(report.seconds_compacting / seconds, 3),
        }  # fmt: skip


def batched(scale: Scale) -> Iterator[Row]:
    """Tokens a second of sessions that reply at once."""
    model, tokens, held = scale.model(scale.shapes[0]), 16, min(scale.held[0], 512)

    async def reply(session: Session) -> None:
        await session.agenerate(max_new_tokens=tokens, do_sample=False, eos_token_id=-1)

    async def replies(sessions: list[Session]) -> None:
        await asyncio.gather(*map(reply, sessions))

    for count in scale.sessions:
        options = {"cap": "8GiB", "policy": "window", "share": 1 / (count + 1), "chunk": 512}
        with agentmem.Runtime(model, tokenizer(), **options) as runtime:
            sessions = [runtime.session() for _ in range(count)]
            for row, session in enumerate(sessions):
                session.read(ids_of(model, held, row)[0].tolist())
            asyncio.run(replies(sessions))
            seconds = timed(model.device, lambda sessions=sessions: asyncio.run(replies(sessions)))
        yield {"name": f"{count} sessions", "tokens/s": round(count * tokens / seconds, 1)}


def fidelity(scale: Scale) -> Iterator[Row]:
    """KL and agreement of the default model under a cap of slots, where its file is on this machine."""
    from agentmem.evaluation import Terms
    from agentmem.evaluation.fidelity import measure
    from agentmem.evaluation.passage import default_text

    if not models.is_fetched():
        yield {"name": "default model", "refused": "its file is not on this machine"}
        return
    model, words = models.load(device_map=scale.device)
    count = 400 if scale == REDUCED else 2048
    ids = torch.tensor(words(default_text())["input_ids"][: count + 1], device=scale.device)
    with torch.inference_mode():
        full = model(input_ids=ids[None, :-1], use_cache=False).logits[0].float().cpu()
    terms = Terms.of(slots=256 if scale == REDUCED else 512)
    for name in ("window", "am-halving"):
        found = measure(model, ids, full, terms.policy(name), terms, tokenizer=words)
        past = slice(found.capacity, None)
        yield {
            "name": name, "KL": round(statistics.mean(found.kl[past]), 4),
            "top-1": round(statistics.mean(found.agrees[past]), 3), "compactions": found.compactions[-1],
        }  # fmt: skip


PARTS: dict[str, tuple[int, Callable[[Scale], Iterator[Row]]]] = {
    "equal": (40, equal_tokens),
    "decode": (110, decode),
    "peak": (90, peaks),
    "long": (90, long_run),
    "batched": (60, batched),
    "fidelity": (60, fidelity),
}
"""The parts with their limits in seconds: 450 together."""


class TooLong(BaseException):
    """A part has reached its limit of seconds."""


@contextmanager
def limited(seconds: int) -> Iterator[None]:
    """Raise :class:`TooLong` in the block after some seconds, at the next line of Python that runs."""

    def stop(*_: object) -> None:
        raise TooLong(f"stopped after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def run_part(name: str, scale: Scale) -> dict[str, Any]:
    """Run one part: its rows, as many as there are, its seconds, and why it ended early, if it did."""
    limit, part = PARTS[name]
    rows: list[Row] = []
    result: dict[str, Any] = {"part": name, "rows": rows, "failed": None}
    began = time.perf_counter()
    try:
        with limited(limit):
            for row in part(scale):
                rows.append(row)
                print(name, json.dumps(row), flush=True)
    except (Exception, TooLong) as error:  # noqa: BLE001  # what fails is a result, and the other parts go on
        result["failed"] = f"{type(error).__name__}: {error}"[:300]
        print(name, result["failed"], flush=True)
    result["seconds"] = round(time.perf_counter() - began, 1)
    gc.collect()
    return result


def table(results: list[dict[str, Any]], machine: str) -> str:
    """Markdown: one line for each row, and one for each part that ended early."""
    lines = [f"Machine: {machine}", "", "| part | what | figures |", "| --- | --- | --- |"]
    for each in results:
        for row in each["rows"]:
            figures = ", ".join(f"{key} {value}" for key, value in row.items() if key != "name")
            lines.append(f"| {each['part']} | {row['name']} | {figures} |")
        if each["failed"]:
            lines.append(f"| {each['part']} | **failed** after {each['seconds']} s | {each['failed']} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Run the parts; 1 if one of them failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/gpu"), help="folder of gpu.json and gpu.md")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--reduced", action="store_true", help="a tiny model on the CPU")
    given = parser.parse_args()
    if not given.reduced and not torch.cuda.is_available():
        parser.error("torch finds no CUDA device; --reduced runs all parts on the CPU")
    scale = REDUCED if given.reduced else FULL
    name = torch.cuda.get_device_name() if scale.device == "cuda" else "CPU, reduced sizes"
    machine = f"{name}, torch {torch.__version__}"
    given.out.mkdir(parents=True, exist_ok=True)
    results = []
    for part in given.parts:
        results.append(run_part(part, scale))
        text = json.dumps({"machine": machine, "parts": results}, indent=2)
        (given.out / "gpu.json").write_text(text + "\n", encoding="utf-8")
        (given.out / "gpu.md").write_text(table(results, machine), encoding="utf-8")
    return int(any(each["failed"] for each in results))


if __name__ == "__main__":
    sys.exit(main())
