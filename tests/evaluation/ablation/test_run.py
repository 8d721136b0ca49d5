"""``agentmem ablate``: rows that survive kills, processes that share the work, a report that stands by itself."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from agentmem.cli import ablate
from agentmem.evaluation.ablation import rows as ablation_rows
from support import forked
from support.shell import agentmem, refused

COMMAND = "import sys; from agentmem.cli import main; sys.exit(main())"
KILLED = """
import os, signal
from agentmem.evaluation.ablation.rows import RowFile

append, rows = RowFile.append, []
def counted(file, row):
    append(file, row)
    rows.append(row)
    if len(rows) == 4:
        os.kill(os.getpid(), signal.SIGKILL)
RowFile.append = counted
"""
TIMES = {"seconds", "compact_seconds"}


@pytest.fixture(scope="module")
def whole(folder: Path) -> Path:
    """The folder of an ablation that ran through."""
    result = agentmem("ablate", *arguments(folder, "whole"))
    assert result.exit_code == 0, result.output
    return folder / "whole"


def arguments(folder: Path, out: str) -> list[str]:
    """What every call is given."""
    return [str(folder / "tiny.yaml"), "--out", str(folder / out), "--cache-dir", str(folder / "logits")]


def start(folder: Path, out: str, before: str = "", **environment: str) -> subprocess.Popen[str]:
    """The command in a process of its own, in which some code runs before it."""
    return forked.Popen(
        [sys.executable, "-c", before + COMMAND, "ablate", *arguments(folder, out)],
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def cells(out: Path) -> list[dict[str, str]]:
    """The CSV without times."""
    with (out / "rows.csv").open(encoding="utf-8") as file:
        return [{name: value for name, value in row.items() if name not in TIMES} for row in csv.DictReader(file)]


def lines(out: Path, rank: int = 0) -> list[str]:
    """The lines of one process's rows."""
    path = out / f"rows-{rank}.jsonl"
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


def test_every_row_says_where_it_comes_from(whole: Path) -> None:
    """Versions, hashes, settings and costs stand in every row, measured or refused."""
    found = [json.loads(line) for line in lines(whole)]

    assert len(found) == 6 + 1 + 6
    for row in found:
        assert len(row["provenance"]["model_sha256"]) == len(row["provenance"]["text_sha256"]) == 64
        assert row["provenance"]["torch"]
        assert row["cell"]["keep_recent"] == (0 if row["cell"]["policy"] == "full" else 8)
        if row["refused"] is None:
            assert row["peak_bytes"] > 0
            assert row["tokens"] in {600, 1000}  # a passage, two documents
            assert row["seconds"] >= row["compact_seconds"] >= 0
            if row["cell"]["policy"] != "full":
                assert row["compactions"] > 0
                assert row["runs"][0]["moments"][-1]["tokens"] in {500, 600}
    assert {row["refused"] is None for row in found if row["cell"]["policy"] == "heavy-hitters"} == {True, False}


def test_the_scores_are_those_of_the_instruments(folder: Path, whole: Path) -> None:
    """KL, recall and peak bytes equal what `agentmem eval` says about the same policies."""
    same = ("--model", str(folder / "model"), "--text", str(folder / "text.txt"), "--slots", "300")
    kept = ("--keep-first", "4", "--keep-recent", "8", "--chunk", "256", "--cache-dir", str(folder / "eval"))
    policies = ("--policies", "window,heavy-hitters,am-halving", "--json", "-")
    fidelity = agentmem("eval", "fidelity", *same, *kept, "--tokens", "600", *policies)
    recall = agentmem(
        "eval", "recall", *same, *kept, "--tokens", "500", "--facts", "3", "--depths", "0.1,0.5", *policies
    )  # fmt: skip

    measured = {(row["instrument"], row["policy"]): row for row in cells(whole) if row["slots"] or not row["cap_bytes"]}
    for row in json.loads(fidelity.stdout):
        mine = measured["fidelity", row["policy"]]
        assert float(mine["KL p95"]) == pytest.approx(row["kl_p95"], rel=1e-4)
        assert float(mine["KL"]) == pytest.approx(row["kl_mean"], rel=0.02)  # blocks differ by one position in length
        assert int(mine["peak_bytes"]) == row["bytes"]
    for row in json.loads(recall.stdout):
        mine = measured["recall", row["policy"]]
        assert float(mine["log-probability"]) == pytest.approx(row["log_prob"], rel=1e-4)
        assert float(mine["recovered"]) == pytest.approx(row["recovered"], rel=1e-2, abs=1e-3)


def test_a_killed_ablation_goes_on_without_losing_or_repeating_a_row(folder: Path, whole: Path) -> None:
    """After SIGKILL in mid-run and half a line on disk the same command ends with the table of an unbroken run."""
    process, out = start(folder, "killed", KILLED), folder / "killed"
    said = process.communicate()[0]
    assert process.returncode == -signal.SIGKILL, said
    kept = lines(out)
    assert len(kept) == 4
    with (out / "rows-0.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"key": "half a li')

    again = agentmem("ablate", *arguments(folder, "killed"))

    assert again.exit_code == 0, again.output
    assert cells(out) == cells(whole)
    assert lines(out)[:4] == kept
    assert len(lines(out)) == len({json.loads(line)["key"] for line in lines(out)}) == 13


def test_two_processes_give_the_rows_of_one(folder: Path, whole: Path) -> None:
    """Each measures its share, the first one writes the table, and it equals that of one process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = [start(folder, "two", RANK=str(rank), LOCAL_RANK=str(rank), **shared) for rank in range(2)]
    outputs = [process.communicate()[0] for process in processes]

    assert [process.returncode for process in processes] == [0, 0], outputs
    assert cells(folder / "two") == cells(whole)
    assert [len(lines(folder / "two", rank)) for rank in range(2)] == [7, 6]


def test_a_finished_ablation_measures_nothing(folder: Path, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same command again, and --draw, only write the report; a refused cell is tried with --again alone."""
    shutil.copytree(whole, folder / "finished")
    tried: list[Any] = []
    append = ablation_rows.RowFile.append
    monkeypatch.setattr(ablation_rows.RowFile, "append", lambda file, row: tried.append(row) or append(file, row))

    for options in ((), ("--draw",)):
        result = agentmem("ablate", *arguments(folder, "finished"), *options)
        assert result.exit_code == 0, result.output
    assert tried == []

    again = agentmem("ablate", *arguments(folder, "finished"), "--again")
    assert again.exit_code == 0, again.output
    assert [row.cell.policy for row in tried] == ["heavy-hitters", "heavy-hitters"]
    assert all(row.refused for row in tried)


def test_two_runs_into_one_folder_are_refused(folder: Path, whole: Path) -> None:
    """A second process would write between the first one's rows."""
    with ablation_rows.RowFile(whole, 0):
        refused(agentmem("ablate", *arguments(folder, "whole")), "another process is writing")


def test_a_missing_extra_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a package of the extra the command says what to install, and shows no traceback."""
    monkeypatch.setattr(ablate, "_EXTRA", ("json", "no_such_package"))

    refused(agentmem("ablate", *arguments(folder, "nothing")), "needs no_such_package", "agentmem-runtime[cli,eval]")


def test_draw_without_rows_is_refused(folder: Path) -> None:
    """There is nothing to draw."""
    refused(agentmem("ablate", *arguments(folder, "nothing"), "--draw"), "no finished row")


def test_a_dry_run_lists_the_cells(folder: Path) -> None:
    """Nothing is measured or written."""
    result = agentmem("ablate", *arguments(folder, "dry"), "--dry-run")

    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-1] == "13 cells"
    assert not (folder / "dry").exists()


class Page(HTMLParser):
    """What a browser would fetch or run, and the ids of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.ids: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note a tag."""
        self.tags.append(tag)
        for name, value in attrs:
            if name in {"src", "href", "xlink:href", "srcset", "data", "action", "poster"}:
                self.addresses.append(value or "")
            if name == "id":
                self.ids.append(value or "")


def test_the_report_stands_by_itself(whole: Path) -> None:
    """No script, no address but those inside the page, every figure there, and no id twice."""
    text = (whole / "report.html").read_text(encoding="utf-8")
    page = Page()
    page.feed(text)

    assert re.findall(r"\b\w+://", text) == []
    assert "@import" not in text
    assert {"script", "iframe", "object", "embed"}.isdisjoint(page.tags)
    assert all(address.startswith(("#", "data:")) for address in page.addresses)
    used = {address[1:] for address in page.addresses if address.startswith("#")} | set(
        re.findall(r"url\(#(.*?)\)", text)
    )
    assert used <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))
    assert {"pareto-fidelity", "pareto-recall", "drift", "saw-tooth", "costs"} <= set(page.ids)
    assert page.tags.count("svg") == 5


def test_the_report_escapes_what_a_user_wrote(folder: Path, whole: Path) -> None:
    """A title and a comment with markup are text on the page."""
    out = Path(shutil.copytree(whole, folder / "escaped"))
    config = folder / "markup.yaml"
    words = (folder / "tiny.yaml").read_text(encoding="utf-8").replace("Tiny", "<script>alert(1)</script>")
    config.write_text(words, encoding="utf-8")
    result = agentmem(
        "ablate", str(config), "--out", str(out), "--cache-dir", str(folder / "logits"), "--draw"
    )  # fmt: skip

    assert result.exit_code == 0, result.output
    assert "<script" not in (out / "report.html").read_text(encoding="utf-8")


def test_the_tables_show_intervals_and_refusals(whole: Path) -> None:
    """Markdown has a line per policy and limit, the interval, the paired difference, and why a cell was refused."""
    text = (whole / "report.md").read_text(encoding="utf-8")

    assert re.search(r"\| window \| 300 slots \| [\d.]+ \[[\d.]+, [\d.]+\] \| – \|", text)
    assert re.search(r"\| am-halving \| 300 slots \| \**[\d.]+ \[[\d.]+, [\d.]+\]\** \| [+-][\d.]+ \[[+-]", text)
    assert "| heavy-hitters | 320.0 KiB | refused |" in text
    assert "is too small" in text.split("## Refused")[1]
