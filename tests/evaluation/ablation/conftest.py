"""A tiny ablation on disk."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.shell import save_model

CONFIG = """\
title: Tiny
models: ./model
threads: 1
texts: {path: text.txt}
policies: [window, heavy-hitters, am-halving]
slots: 300
caps: 320KiB
keep_first: 4
keep_recent: 8
chunk: 256
resamples: 200
instruments:
  fidelity: {tokens: 600}
  recall: {tokens: 500, facts: 3, depths: [0.1, 0.5]}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Model, text and configuration."""
    made = tmp_path_factory.mktemp("ablation")
    (made / "model").mkdir()
    save_model(made / "model")
    words = " ".join(f"It was hour {hour} of the day." for hour in range(80))
    (made / "text.txt").write_text(words, encoding="utf-8")
    (made / "tiny.yaml").write_text(CONFIG, encoding="utf-8")
    return made
