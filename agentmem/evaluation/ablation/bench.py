"""Measure the cells of an ablation on one loaded model, and compute the keys under which results are saved.

A cell is one combination of the grid's settings, measured by one instrument (fidelity, recall or a task).
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Self

import torch

from agentmem import models
from agentmem.errors import AgentmemError
from agentmem.evaluation import fidelity, recall
from agentmem.evaluation.ablation.config import Ablation, Fidelity, Recall, TaskArguments, Text
from agentmem.evaluation.ablation.grid import Cell
from agentmem.evaluation.ablation.rows import Provenance, Row
from agentmem.evaluation.facts import documents
from agentmem.evaluation.full_logits import full_logits, model_digest, passage_key
from agentmem.evaluation.kept import code_digest, settings_key
from agentmem.evaluation.passage import passage

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from agentmem.evaluation.ablation.rows import Run


@dataclass
class Bench:
    """One loaded model, with everything that is needed to measure the cells of this model."""

    ablation: Ablation
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    digest: str
    """Hash of the model's configuration and weights; see :func:`agentmem.evaluation.full_logits.model_digest`."""
    texts: dict[Text, str]
    folder: Path
    """Folder to which relative paths of models and data files are relative."""
    cache_dir: Path
    """Folder in which full memory's logits are kept."""
    out: Path
    """Folder of the results; tasks write their logs into its subfolder ``logs``."""

    @classmethod
    def open(
        cls, ablation: Ablation, name: str, texts: dict[Text, str], folder: Path, cache_dir: Path, out: Path
    ) -> Self:
        """Load the model ``name``, and return the :class:`Bench` for the ablation's measurements of this model.

        A name that begins with ``./`` or ``../`` is a folder relative to ``folder``.

        Raises:
            ModelUnavailable: the model cannot be loaded.

        """
        source = str(folder / name) if name.startswith(("./", "../")) else name
        dtype = None if ablation.dtype == "auto" else getattr(torch, ablation.dtype)
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if ablation.device == "cuda" else ablation.device
        model, tokenizer = models.load(source, dtype=dtype, device_map=None if device == "cpu" else device)
        return cls(ablation, model, tokenizer, model_digest(model), texts, folder, cache_dir, out)

    def key(self, cell: Cell) -> str:
        """Return a key of 24 hexadecimal digits, a digest of everything that the cell's result depends on."""
        settings = self.ablation.instruments.chosen[cell.instrument]
        facts = {
            "instrument": cell.instrument,
            "model": self.digest,
            "dtype": str(self.model.dtype),
            "text": self._text_digest(cell),
            "offset": None if cell.text is None else cell.text.offset,
            "code": settings_key(cell.terms.policy(cell.policy), cell.terms, settings),
            "task": code_digest("evaluation/tasks") if isinstance(settings, TaskArguments) else None,
        }
        return _sha256(json.dumps(facts, sort_keys=True))[:24]

    def row(self, cell: Cell) -> Row:
        """Measure a cell and return its row (result); if agentmem raises an error, ``Row.refused`` has the message."""
        key, provenance = self.key(cell), self._provenance(cell)
        settings = self.ablation.instruments.chosen[cell.instrument]
        try:
            if isinstance(settings, Fidelity):
                return Row.measured(key, cell, provenance, (self._fidelity(cell, settings),))
            if isinstance(settings, Recall):
                return Row.measured(key, cell, provenance, self._recall(cell, settings))
            if isinstance(settings, TaskArguments):
                return Row.measured(key, cell, provenance, self._task(cell, settings))
        except AgentmemError as error:
            return Row(key=key, cell=cell, provenance=provenance, refused=str(error))
        raise AssertionError(cell.instrument)

    def _fidelity(self, cell: Cell, settings: Fidelity) -> Run:
        words, offset = self._words(cell)
        ids = passage(self.tokenizer, words, offset=offset, tokens=settings.tokens)
        policy = cell.terms.policy(cell.policy)
        cell.terms.plan(self.model, policy)  # an impossible limit is refused before full memory is computed
        full = full_logits(self.model, ids, self.cache_dir / passage_key(self.model, ids, self.digest))
        return fidelity.measure(self.model, ids, full, policy, cell.terms, tokenizer=self.tokenizer)

    def _recall(self, cell: Cell, settings: Recall) -> Iterator[Run]:
        words, offset = self._words(cell)
        first = max(self.ablation.keep_first)  # the same documents in every cell
        found = documents(self.tokenizer, words, settings.quiz(cell.seed), offset=offset, keep_first=first)
        terms = recall.full_terms(found) if cell.policy == recall.FULL else cell.terms
        for document in found:
            yield recall.measure(self.model, document, terms.policy(cell.policy), terms, tokenizer=self.tokenizer)

    def _task(self, cell: Cell, settings: TaskArguments) -> tuple[Run, ...]:
        from agentmem.evaluation.tasks.run import attempts  # importing inspect_ai takes a second

        terms = None if cell.limit is None else cell.terms
        if terms is not None:
            terms.plan(self.model, terms.policy(cell.policy))  # inspect would wrap the refusal
        loaded = (self.model, self.tokenizer)
        arguments = dict(settings.arguments)
        if isinstance(arguments.get("data"), str):
            arguments["data"] = str(self.folder / Path(str(arguments["data"])).expanduser())
        return attempts(settings.name, arguments, loaded, terms, cell.policy, cell.seed, self.out / "logs")

    def _words(self, cell: Cell) -> tuple[str, int]:
        """Return the cell's whole text, and the offset of the first character to use."""
        text = cell.text or Text()
        return self.texts[text], text.offset

    def _text_digest(self, cell: Cell) -> str | None:
        return None if cell.text is None else _sha256(self.texts[cell.text])

    def _provenance(self, cell: Cell) -> Provenance:
        return Provenance(
            agentmem=version("agentmem-runtime"),
            torch=torch.__version__,
            transformers=version("transformers"),
            python=platform.python_version(),
            commit=commit(),
            model_sha256=self.digest,
            text_sha256=self._text_digest(cell),
            device=_device(self.model),
            dtype=str(self.model.dtype).removeprefix("torch."),
            threads=torch.get_num_threads(),
        )


@cache
def commit() -> str | None:
    """Return the git commit of the running agentmem, followed by ``+`` if tracked files were changed since.

    The result is ``None`` if agentmem does not run from a git checkout, or git is not available.
    """
    folder = Path(__file__).parent
    try:
        head = _git(folder, "rev-parse", "HEAD")
        # A virtual environment with agentmem may lie inside the repository of another project.
        if _git(folder, "ls-files", "--", Path(__file__).name) == "":
            return None
        return head + ("+" if _git(folder, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(folder: Path, *words: str) -> str:
    command = ["git", "-C", str(folder), *words]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()


def _device(model: PreTrainedModel) -> str:
    if model.device.type == "cuda":
        return torch.cuda.get_device_name(model.device)
    return f"{model.device.type} {platform.machine()}"


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
