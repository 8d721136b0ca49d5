"""Benchmarks run on a tiny model: what they measure is not looked at, only that they come to their end."""

from __future__ import annotations

import json
import re
import runpy
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agentmem import models
from agentmem.testing import tiny_model
from benchmarks import gpu
from support import forked, tiny_chat


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny model in place of the default one."""
    loaded = tiny_model("llama", vocab_size=40000, max_position_embeddings=16384), tiny_chat.tokenizer()
    monkeypatch.setattr(models, "load", lambda *_args, **_options: loaded)
    monkeypatch.setattr(subprocess, "Popen", forked.Popen)


def run(monkeypatch: pytest.MonkeyPatch, name: str, *arguments: str) -> object:
    """Run ``python -m benchmarks.name``; its exit code."""
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    monkeypatch.delitem(sys.modules, f"benchmarks.{name}", raising=False)  # another benchmark may have imported it
    try:
        runpy.run_module(f"benchmarks.{name}", run_name="__main__")
    except SystemExit as ended:
        return ended.code
    return 0


def test_decode_writes_its_rows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Ten rows of the documented keys, every ratio that of its two medians."""
    monkeypatch.setenv("BENCH_JSON", str(tmp_path / "bench.json"))

    assert run(monkeypatch, "decode") == 0

    rows: list[dict[str, Any]] = json.loads((tmp_path / "bench.json").read_text(encoding="utf-8"))
    names = ["decode_1024", "decode_4096", "decode_8192_seen_1024_held", "unequal_heads_1024"]
    names += [f"{coding}_{held}" for held in (1024, 4096) for coding in ("int8", "k8v4", "int4")]
    assert [each["name"] for each in rows] == names
    for each in rows:
        assert set(each) == {"name", "median_ms", "stock_median_ms", "ratio"}
        assert each["ratio"] == pytest.approx(each["median_ms"] / each["stock_median_ms"], rel=0.01)


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (
            "attention --sequences 2 --held 32 --rounds 1 --slot-dtype int4",
            r'"instructions": 0, "sequences": 2, .+"python": ',
        ),
        ("peak --cap 1600KiB --tokens 3000", r"3000 tokens into \d+ slots per head, [1-9]\d* compactions"),
        ("rebasing --tokens 900 --new 32 --slots 256 --policy window", r"perplexity, fresh window of  256 .+ ratio"),
        ("solvers --heads 1 --repeats 1 --no-oracles", r'"name": "pursuit-fast", .+"log_mass_error": 0\.\d+'),
        ("sessions cancels --cancels 2", "equal to undisturbed: True"),
        ("serving kills --kills 1", "1 kills: each time it started again, and the saved conversation and item went on"),
        ("serving connections --connections 40", "40 connections: answered"),
    ],
)
def test_a_benchmark_ends_well(
    command: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 0, and the line that says what was found."""
    assert run(monkeypatch, *command.split()) == 0
    assert re.search(said, capsys.readouterr().out)


def test_the_gpu_benchmark_writes_every_part(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """All parts come to their end in the reduced form, and stand in the JSON and in the table."""
    monkeypatch.setattr(models, "is_fetched", lambda: True)

    monkeypatch.setattr(sys, "argv", ["gpu", "--reduced", "--out", str(tmp_path)])

    assert gpu.main() == 0

    parts = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))["parts"]
    written = (tmp_path / "gpu.md").read_text(encoding="utf-8")
    assert [each["part"] for each in parts] == ["equal", "decode", "peak", "long", "batched", "fidelity"]
    assert parts[0]["rows"] == [{"name": "tiny", "tokens": 32, "equal until": 32}]
    assert all(row["within"] for row in parts[2]["rows"])
    for each in parts:
        assert f"| {each['part']} | {each['rows'][0]['name']} |" in written


def test_a_part_that_fails_is_written_and_the_next_one_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error and a limit of seconds both end one part only, and the rows before them are kept."""

    def broken(_scale: object) -> Iterator[dict[str, object]]:
        yield {"name": "before"}
        raise ValueError("no such device")

    def slow(_scale: object) -> Iterator[dict[str, object]]:
        yield {"name": "before"}
        time.sleep(5)

    monkeypatch.setattr(gpu, "PARTS", {"broken": (5, broken), "slow": (1, slow)})

    results = [gpu.run_part(name, gpu.REDUCED) for name in gpu.PARTS]

    assert [each["failed"] for each in results] == ["ValueError: no such device", "TooLong: stopped after 1 s"]
    assert "| broken | before |" in gpu.table(results, "none")
    assert "| slow | **failed** after" in gpu.table(results, "none")
