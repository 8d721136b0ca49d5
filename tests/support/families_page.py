"""Writes docs/models.md; a test holds it to the code.

Run ``PYTHONPATH=tests .venv/bin/python -m support.families_page`` where a family, a reason or a column has changed.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from agentmem import hf
from support import families

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
_ROW = re.compile(r"^\| .* \| `(\w+)` \| .* \| ([^|]*) \|$", re.MULTILINE)

REFUSED: Mapping[str, str] = {
    "other heads in some layers": "mimo_v2_flash",
    "soft-capping": "gemma2 vaultgemma",
    "shared keys and values": "gemma3n_text",
    "chunked attention": "llama4_text",
    "recurrent or convolution layers": "qwen3_next qwen3_5_text kimi_linear granitemoehybrid nemotron_h bamba jamba "
    "zamba2 olmo_hybrid recurrent_gemma lfm2 falcon_h1",
    "no attention": "mamba rwkv",
    "an indexer": "deepseek_v32 glm_moe_dsa",
    "caches of their own": "deepseek_v4",
    "masks of their own": "doge",
    "attention code of their own": "falcon bloom gptj mpt gpt_neo diffllama",
    "encoders": "bert t5",
}
"""What is not handled, and families that have it."""

_FIELDS: Mapping[str, Mapping[str, Any]] = {
    "lfm2": {"num_hidden_layers": 4, "layer_types": ["conv", "conv", "full_attention", "conv"]},
}
"""What default configs lack of published models."""

_HEAD = """# Models

What a model does decides whether it can be capped, not its name. agentmem reads the kinds of cache layers, heads, dims
and windows from the config, and refuses by name what changes attention. The families of the tables below are tested
with tiny random models. Any other is checked when it is first used: a tiny random model of its class, with one layer of
every kind at least, must give the logits of one stock forward when it is fed in pieces, decoded, batched with pads on
the left and run by `generate`. After each of two compactions every slot must hold the key of its position, and the next
logits must be those of an oracle that holds the same slots. That takes a second or less, once in a process. What fails
is refused with what differed, before anything is changed. The same from a shell, without weights, where a refusal is
exit code 1:

```text
agentmem check Qwen/Qwen3-0.6B
```

## Tested

Every family of these tables passes all of it: prefill, pieces, decoding, left-padded batches, `generate`, two
compactions; two sequences in one forward, as sessions are fed; forks and snapshots of a compacted session, which go on
as it does; and bfloat16, whose logits are at most twice as far from float32 as stock's, at the median token. *Layers*
are what the default config has: full attention is compacted, sliding windows are held whole. *Re-basing* is
`rebase=True`, which turns stored keys to lower positions; before it is used, the keys of one token at two positions
show whether that is exact. *Up to its positions*: learned positions end in an `IndexError` as in stock, and a probe
that would pass them is replaced by eviction, which the report says.

"""
_LATENT = """
Slots hold the keys and values of every head, as attention is given them, not the latent that transformers caches: a
slot costs heads × (key dim + value dim) numbers. `agentmem plan` shows what that comes to.
"""
_AROUND = """
With text alone: images and other inputs are refused by name, since a probe runs ids again.
"""
_GROUPS = {
    "Dense": (families.DENSE, ""),
    "Mixture of experts": (families.EXPERTS, ""),
    "Latent attention (MLA)": (families.LATENT, _LATENT),
    "Text models inside multimodal ones": (families.AROUND, _AROUND),
}
_REFUSED_HEAD = """
## Refused

By the reason that `agentmem check` gives, here for default configs.

| what | families | reason of the first |
| --- | --- | --- |
"""
_TAIL = """
Written by `PYTHONPATH=tests .venv/bin/python -m support.families_page`.
"""


def render(rebasing: Mapping[str, str]) -> str:
    """The page, given the last column of the tested families."""
    parts = [_HEAD]
    for title, (group, note) in _GROUPS.items():
        parts.append(
            f"### {title}\n{note}\n| family | `model_type` | layers | re-basing |\n| --- | --- | --- | --- |\n"
        )
        parts += [row(family, rebasing[family]) + "\n" for family in group]
        parts.append("\n")
    parts[-1] = _REFUSED_HEAD
    for what, names in REFUSED.items():
        for _, found in groupby(names.split(), _alike):
            group = list(found)
            parts.append(f"| {what} | {', '.join(f'`{family}`' for family in group)} | {reason(group[0])} |\n")
    return "".join([*parts, _TAIL])


def row(family: str, rebasing: str) -> str:
    """One line of a tested family."""
    layers = hf.describe(AutoConfig.for_model(family, **families.TABLE[family].fields), itemsize=4).layers
    kinds = {"full" if layer.window is None else "sliding" for layer in layers}
    return f"| {families.TABLE[family].label} | `{family}` | {' and '.join(sorted(kinds))} | {rebasing} |"


def reason(family: str) -> str:
    """Why a family is refused."""
    found = hf.check(AutoConfig.for_model(family, **_FIELDS.get(family, {}))).reason
    assert found is not None, f"{family} passes"
    return found.partition("; docs/models.md")[0].replace("|", r"\|")


def _alike(family: str) -> str:
    """The reason without what differs from family to family."""
    return re.sub(r"\w*Attention |'\w+'|layer \d+|=[\d.]+", "", reason(family))


def rebasing_of(page: str) -> dict[str, str]:
    """The last column of a page that was written."""
    return {family: said for family, said in _ROW.findall(page) if family in families.TABLE}


def main() -> None:
    """Run all families and write the page."""
    with tempfile.TemporaryDirectory() as folder:
        rebasing = {family: families.passed(family, Path(folder)) for family in families.TABLE}
    PAGE.write_text(render(rebasing), encoding="utf-8")


if __name__ == "__main__":
    main()
