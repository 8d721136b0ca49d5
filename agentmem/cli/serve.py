"""``agentmem serve``: serve a model under a cap to any client of OpenAI's API."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import typer

from agentmem import models, plugins
from agentmem.cli.arguments import Cap, Device, Model, SlotNumbers
from agentmem.cli.console import OUT
from agentmem.cli.loading import Dtype, load_model
from agentmem.cli.logs import log_requests
from agentmem.errors import SettingsRefused
from agentmem.sessions import Runtime
from agentmem.settings import Settings, format_bytes

_POLICY = "am-halving"


def serve(
    *,
    model: Model = None,
    cap: Cap = "64MiB",
    policy: Annotated[str, typer.Option(help="Of conversations that choose none; see `agentmem policies`.")] = _POLICY,
    share: Annotated[
        float, typer.Option(min=1e-6, max=1.0, help="Part of the cap that one running conversation may use.")
    ] = 0.5,
    host: Annotated[str, typer.Option(help="Address to listen on; others than loopback need keys.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 is any that is free.")] = 8000,
    api_key_file: Annotated[
        Path | None, typer.Option(help="API keys, one a line; without it no key is asked for.", show_default=False)
    ] = None,
    state: Annotated[
        Path | None,
        typer.Option(
            help="Folder for what outlives the server: conversations, responses, compaction items.", show_default=False
        ),
    ] = None,
    shared: Annotated[
        bool, typer.Option("--shared", help="Several servers use the state folder at a time, on any machines.")
    ] = False,
    alias: Annotated[
        list[str] | None, typer.Option(help="Another name of the model; may be repeated.", show_default=False)
    ] = None,
    chat_template: Annotated[
        str | None,
        typer.Option(
            help="Jinja file in place of the tokenizer's template, or chatml-tools: ChatML with a place for tools.",
            show_default=False,
        ),
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Of a reply whose request has no limit.")] = 1024,
    max_requests: Annotated[int, typer.Option(min=1, help="At work or waiting; more are answered with 429.")] = 64,
    keep_recent: Annotated[int, typer.Option(min=0, help="Last tokens that are never compacted.")] = 96,
    rebase: Annotated[
        bool, typer.Option("--rebase", help="Go on past the model's positions by moving slots to lower ones.")
    ] = False,
    slot_dtype: SlotNumbers = "auto",
    dtype: Annotated[Dtype, typer.Option(help="Number format; auto is the checkpoint's own.")] = Dtype.AUTO,
    device: Device = "cpu",
) -> None:
    """Serve chat completions, responses and compaction items whose memory is latent; Ctrl-C ends it.

    A compaction item stands for a conversation: a client sends the item back to restore the conversation. Latent memory
    means that the item names a snapshot of keys and values, and has no summary in words.
    """
    launch = _launch()
    plugins.policy(policy)  # options that can be checked without a model are checked before the model is loaded
    Settings.of(cap=cap, keep_recent=keep_recent, rebase=rebase, slot_dtype=slot_dtype)
    keys = launch.ApiKeys() if api_key_file is None else launch.ApiKeys.of_file(api_key_file)
    launch.check_keys(host, keys)
    name = models.DEFAULT.name if model is None else Path(model).name if Path(model).exists() else model
    settings = launch.ServerSettings.of(
        models=(name, *(alias or ())), state=state, shared=shared, reply_tokens=max_tokens, max_requests=max_requests
    )
    template = None if chat_template is None else launch.read_template(chat_template)
    log_requests()
    with launch.using(state, shared=shared):
        loaded, tokenizer = load_model(model, dtype, device)
        tokenizer.chat_template = template or tokenizer.chat_template
        options: dict[str, Any] = {"share": share, "keep_recent": keep_recent, "rebase": rebase}
        options["slot_dtype"] = slot_dtype
        with Runtime(
            loaded,
            tokenizer,
            cap=cap,
            policy=policy,
            pressure=("trim", "disk"),  # idle conversations go to disk rather than being compacted further
            spill=None if state is None else state / "idle",
            max_waiting=max_requests,
            **options,
        ) as runtime:
            server = launch.Server(runtime, settings, keys)
            launch.serve(server, host, port, lambda url: _announce(launch, server, url))


def _announce(launch: ModuleType, server: Any, url: str) -> None:
    runtime, name = server.runtime, server.settings.models[0]
    OUT.print(f"{name} under {format_bytes(runtime.cap)}, {runtime.policy}: {url}\n", markup=False)
    OUT.print(launch.to_paste(url, name, keys=server.keys.required), markup=False)
    OUT.file.flush()


def _launch() -> ModuleType:
    """Import the module that runs a server; its packages come with the extra ``server``.

    Raises:
        SettingsRefused: the extra ``server`` is not installed.

    """
    try:
        from agentmem.serving import launch
    except ModuleNotFoundError as error:
        raise SettingsRefused(
            f"the server needs {error.name}, which is not installed; install the extra: "
            "pip install 'agentmem-runtime[server]'"
        ) from None
    return launch
