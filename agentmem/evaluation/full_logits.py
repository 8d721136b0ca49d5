"""Compute the logits of full memory once, with transformers' own cache, and keep them in a memory-mapped file.

The logits are stored as float32, because half precision is too coarse: its rounding would change the log-probability of
a rare token by up to 1 %. Such errors would hide the KL of a memory without compactions, which is only about 1e-9. With
a vocabulary of 49,152 tokens, 3,072 positions take 604 MB.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from typing import TYPE_CHECKING

import numpy as np
import torch
import transformers
from filelock import FileLock
from transformers import DynamicCache

from agentmem.contracts import blocks
from agentmem.errors import AgentmemError
from agentmem.settings import exact_bytes, format_bytes

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from transformers import PreTrainedModel

_PIECE = 256
"""Tokens in one forward. This number is fixed, so that no setting of the user affects the stored logits."""
_NAME = "full-logits"
MOST_BYTES = 16 << 30
"""The most bytes of logits that are kept in one folder, unless the caller says otherwise."""
_SAMPLE = 4096
"""About how many elements of each weight are hashed, evenly spread over the weight."""


def model_digest(model: PreTrainedModel) -> str:
    """Return a SHA-256 hash of a model's configuration and weights, in hexadecimal digits.

    Of each weight, the name, shape, dtype and an evenly spread sample of its elements are hashed.
    """
    digest = hashlib.sha256(model.config.to_json_string(use_diff=False).encode())
    for name, weight in model.state_dict().items():
        flat = weight.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // _SAMPLE)].to("cpu", torch.float64)
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()


def passage_key(model: PreTrainedModel, ids: torch.Tensor, digest: str | None = None) -> str:
    """Return a key of 24 hexadecimal digits under which results on the passage ``ids`` are saved.

    The key depends on the model, its dtype and device, the ids, and the versions of torch and transformers. For several
    passages, compute the model's :func:`model_digest` once and pass it as ``digest``.
    """
    facts = {
        "model": digest or model_digest(model),
        "ids": hashlib.sha256(ids.numpy().tobytes()).hexdigest(),
        "dtype": str(model.dtype),
        "device": model.device.type,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:24]


def full_logits(
    model: PreTrainedModel,
    ids: torch.Tensor,
    folder: Path,
    *,
    first: int = 0,
    fresh: bool = False,
    most_bytes: int = MOST_BYTES,
    progress: Callable[[int], None] = lambda _: None,
) -> torch.Tensor:
    """Return the logits of full memory after each of ``ids [tokens + 1]`` except the last: ``[tokens, V]`` float32.

    If ``folder`` already holds the logits, they are loaded instead of computed, unless ``fresh`` is true. With
    ``first``, the result has only the logits from that position on, ``[tokens - first, V]``. ``progress`` is called
    with the number of tokens read so far.

    All logits below the folder's parent take ``most_bytes`` at most: those used longest ago are deleted first.

    Raises:
        AgentmemError: the folder cannot be written, or these logits alone take more than ``most_bytes`` or the free
            space; the message has the bytes needed.

    """
    tokens, vocabulary = len(ids) - 1 - first, _vocabulary(model, ids)
    path = folder / (f"{_NAME}-from-{first}.f32" if first else f"{_NAME}.f32")
    size = tokens * vocabulary * 4
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock")):  # of several processes, one computes the file and the others wait
            if fresh or not path.exists() or path.stat().st_size != size:
                _require_space(folder, size, most_bytes)
                _compute(model, ids[:-1], first, path, progress)
        path.touch()  # its time of use
        # Copy-on-write: torch wants writable memory, but the file must not change.
        return torch.from_numpy(np.memmap(path, dtype=np.float32, mode="c", shape=(tokens, vocabulary)))
    except OSError as error:
        raise AgentmemError(
            f"evaluation: cannot keep the full-memory logits ({format_bytes(size)}) at {path}: "
            f"{error.strerror or error}; choose another place with --cache-dir"
        ) from error


def _compute(
    model: PreTrainedModel, ids: torch.Tensor, first: int, path: Path, progress: Callable[[int], None]
) -> None:
    """Compute the logits from position ``first`` on and write them to ``path``.

    The logits are written to another file that is renamed at the end, so that the file at ``path`` is always complete.
    """
    partial = path.with_suffix(".partial")
    cache = DynamicCache(config=model.config)
    with partial.open("wb") as file, torch.no_grad():
        for part in blocks(len(ids), _PIECE):
            piece = ids[part].unsqueeze(0).to(model.device)
            wanted = part.stop - max(part.start, first)
            output = model(input_ids=piece, past_key_values=cache, use_cache=True, logits_to_keep=max(1, wanted))
            if wanted > 0:
                file.write(output.logits[0].float().cpu().contiguous().numpy().tobytes())
            progress(part.stop)
    partial.replace(path)


def _vocabulary(model: PreTrainedModel, ids: torch.Tensor) -> int:
    """Run the model on one token and return the number of its logits; the config's ``vocab_size`` may differ."""
    with torch.no_grad():
        return int(model(input_ids=ids[:1].unsqueeze(0).to(model.device), use_cache=False).logits.shape[-1])


def kept(root: Path) -> list[Path]:
    """Return the files of logits below a folder, those used longest ago first."""
    found = [(path.stat().st_mtime_ns, path) for path in root.glob(f"*/{_NAME}*.f32")]
    return [path for _, path in sorted(found)]


def clean(root: Path, most_bytes: int = 0) -> int:
    """Delete logits below a folder, those used longest ago first, until ``most_bytes`` are left; return bytes freed.

    Measurements that were made with them stay, so they need not be computed again for the same comparison.
    """
    files = [(path, path.stat().st_size) for path in kept(root)]
    held, freed = sum(size for _, size in files), 0
    for path, size in files:
        if held - freed > most_bytes:
            path.unlink(missing_ok=True)
            freed += size
    return freed


def _require_space(folder: Path, size: int, most_bytes: int) -> None:
    if size > most_bytes:
        raise AgentmemError(
            f"evaluation: the full-memory logits need {exact_bytes(size)} on disk, and at most "
            f"{exact_bytes(most_bytes)} may be kept; lower --tokens or raise --cache-limit"
        )
    clean(folder.parent, most_bytes - size)
    free = shutil.disk_usage(folder).free
    if free < size:
        raise AgentmemError(
            f"evaluation: the full-memory logits need {exact_bytes(size)} on disk, but {folder} has "
            f"{exact_bytes(free)} free; lower --tokens or choose another place with --cache-dir"
        )
