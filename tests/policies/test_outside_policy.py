"""A policy of a distribution of its own: installed with pip from its source, found, used, and named when it breaks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import pytest
import torch

import agentmem
from agentmem import plugins
from agentmem.testing import check_policy, tiny_model

PROJECT = """
    [build-system]
    requires = ["setuptools"]
    build-backend = "setuptools.build_meta"

    [project]
    name = "thrifty-policies"
    version = "2.1"

    [project.entry-points."agentmem.policies"]
    thrifty = "thrifty_policies:thrifty"

    [tool.setuptools]
    py-modules = ["thrifty_policies"]
"""
MODULE = '''
    """Every so-manieth slot, evenly spread."""

    import torch

    from agentmem import Compaction, Compactor, HeadCompaction, Policy
    from agentmem.policies.budgets.uniform import Uniform


    class Spread(Compactor):
        def __init__(self, extra):
            self.extra = extra

        def workspace(self, shape):
            return shape.heads * shape.budget * 16 + 4096

        def compact(self, segment, slots):
            heads = []
            for head, count in zip(segment.heads, slots):
                kept = torch.arange(count + self.extra) * head.slots // max(1, count + self.extra)
                heads.append(HeadCompaction(kept))
            return Compaction(tuple(heads))


    def thrifty(*, extra: int = 0) -> Policy:
        return Policy("thrifty", "evenly spread slots", "-", Spread(extra), Uniform())
'''
SETTINGS = {"keep_first": 2, "keep_recent": 6, "max_slots": 32, "min_reclaim": 4, "chunk": 16}


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The distribution, built and installed into a folder of its own."""
    source, site = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site")
    (source / "pyproject.toml").write_text(dedent(PROJECT), encoding="utf-8")
    (source / "thrifty_policies.py").write_text(dedent(MODULE), encoding="utf-8")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    subprocess.run([*command, "--target", str(site), str(source)], check=True)
    return site


@pytest.fixture(autouse=True)
def _on_path(installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(installed)


def test_it_is_found_and_said_where_it_comes_from() -> None:
    """The catalogue lists the outside policy with its distribution."""
    row = next(row for row in plugins.catalogue() if row.name == "thrifty")
    assert row.distribution == "thrifty-policies 2.1"
    check_policy("thrifty").raise_if_broken()


def test_it_is_used() -> None:
    """A capped generate compacts with it."""
    model = tiny_model("llama")
    with agentmem.capped(model, cap="8MiB", policy="thrifty", **SETTINGS) as memory:
        model.generate(torch.arange(3, 60)[None], past_key_values=memory, max_new_tokens=30, min_new_tokens=30)
    assert memory.report().policy == "thrifty"
    assert memory.report().num_compactions >= 2


def test_it_is_named_when_it_breaks_the_contract() -> None:
    """One slot too many is refused before the commit, by the policy's name."""
    model = tiny_model("llama")
    options = {"extra": 1}
    with (
        pytest.raises(agentmem.PolicyContractBroken, match="'thrifty'"),
        agentmem.capped(model, cap="8MiB", policy="thrifty", policy_options=options, **SETTINGS) as memory,
    ):
        model.generate(torch.arange(3, 60)[None], past_key_values=memory, max_new_tokens=30)
