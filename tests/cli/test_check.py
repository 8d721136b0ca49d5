"""``agentmem check``: a family by its config alone."""

from __future__ import annotations

import json
from pathlib import Path

from transformers import AutoConfig

from support.shell import agentmem, refused


def saved(folder: Path, family: str) -> str:
    """A folder that holds a config and nothing else."""
    AutoConfig.for_model(family).save_pretrained(folder)
    return str(folder)


def test_a_family_that_passes(tmp_path: Path) -> None:
    """A line for every check and the verdict; no weights are needed."""
    result = agentmem("check", saved(tmp_path, "mixtral"))

    assert result.exit_code == 0, result.output
    for name in ("prefill in chunks", "left-padded batch", "logits after 1 compaction"):
        assert name in result.stdout
    assert "model_type 'mixtral' can be capped" in result.stderr


def test_a_family_that_fails(tmp_path: Path) -> None:
    """Exit code 1 and the one reason."""
    refused(agentmem("check", saved(tmp_path, "doge")), "'doge' cannot be capped", "a mask of its own")


def test_json_has_every_check(tmp_path: Path) -> None:
    """As the report has them; a refusal's reason too, beside its exit code."""
    good = agentmem("check", "--json", saved(tmp_path / "good", "qwen3"))
    bad = agentmem("check", "--json", saved(tmp_path / "bad", "gemma2"))

    found = json.loads(good.stdout)
    assert found["family"] == "qwen3"
    assert found["reason"] is None
    assert {"name": "attention calls", "difference": None} in found["checks"]
    assert bad.exit_code == 1
    assert json.loads(bad.stdout)["reason"].startswith("attn_logit_softcapping=50.0")


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    """As for every command."""
    refused(agentmem("check", str(tmp_path / "none")), "none")
