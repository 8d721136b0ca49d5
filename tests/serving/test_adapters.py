"""Agent frameworks through the server, each by its own client for OpenAI: no adapter is needed.

A framework that is not installed is skipped: the extra ``adapters`` has them.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

import pytest
from openai import AsyncOpenAI

from agentmem import Runtime
from agentmem.serving import launch
from agentmem.serving.app import create_app
from support import chat_templates, serving, talk

ALIAS = "gpt-4o-tiny"
KEY = serving.KEYS[0]


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """A server of a random model, whose calls are held to their schemas and whose texts are nonsense."""
    tokenizer = copy.deepcopy(chat_templates.tokenizer("chatml"))  # others share it
    tokenizer.chat_template = launch.read_template("chatml-tools")
    made = Runtime(talk.model(), tokenizer, cap="64MiB", share=0.25, policy="window", **talk.ROOMY)
    of = serving.server(made, keys=serving.KEYS)
    with serving.listening(create_app(of), of) as found:
        yield found


async def test_openai_agents_run_with_a_session_that_the_server_compacts(url: str) -> None:
    """Two runs with two tools in one session; its history becomes an item, and a third run goes on from that."""
    agents = pytest.importorskip("agents", reason="openai-agents is not installed")
    agents.set_tracing_disabled(True)
    called = []

    @agents.function_tool
    def weather(rain: bool) -> str:
        """Say the weather."""
        called.append(f"weather {rain}")
        return "noted"

    @agents.function_tool
    def clock(noon: bool) -> str:
        """Say the time."""
        called.append(f"clock {noon}")
        return "noted"

    async with AsyncOpenAI(base_url=url, api_key=KEY) as client:
        plain = agents.SQLiteSession("one")
        session = agents.OpenAIResponsesCompactionSession(
            "one", plain, client=client, model=ALIAS, should_trigger_compaction=lambda _: True
        )
        for name in ("weather", "clock", "weather"):
            if called[1:]:
                await session.run_compaction({"force": True, "compaction_mode": "input"})
            agent = agents.Agent(
                "tester",
                instructions="Be brief.",
                model=agents.OpenAIResponsesModel(ALIAS, client),
                tools=[weather, clock],
                tool_use_behavior="stop_on_first_tool",
                model_settings=agents.ModelSettings(tool_choice=name, temperature=0, max_tokens=60),
            )
            made = await agents.Runner.run(agent, "Well?", session=session)
            assert made.final_output == "noted"
        kept = [item.get("type") for item in await session.get_items()]
        plain.close()
    assert [each.split()[0] for each in called] == ["weather", "clock", "weather"]
    assert "compaction" in kept


def test_smolagents_has_its_own_client(url: str) -> None:
    """``OpenAIServerModel`` demands a call, as ``ToolCallingAgent`` has it do, and takes plain text."""
    smolagents = pytest.importorskip("smolagents", reason="smolagents is not installed")

    class Weather(smolagents.Tool):  # type: ignore[misc,name-defined]  # it may not be there
        name, description, output_type = "weather", "Say the weather.", "string"
        inputs = {"rain": {"type": "boolean", "description": "Whether it rains."}}  # noqa: RUF012  # as it wants it

        def forward(self, rain: bool) -> str:
            return str(rain)

    model = smolagents.OpenAIServerModel(serving.MODEL, api_base=url, api_key=KEY, temperature=0, max_tokens=60)
    said = [smolagents.ChatMessage(role="user", content=[{"type": "text", "text": "Does it rain?"}])]
    made = model.generate(said, tools_to_call_from=[Weather()])
    (call,) = made.tool_calls
    assert call.function.name == "weather"
    assert set(json.loads(call.function.arguments)) == {"rain"}
    assert model.generate(said).token_usage.output_tokens > 0
    assert list(model.generate_stream(said))


def test_langchain_has_its_own_client(url: str) -> None:
    """``ChatOpenAI`` talks, streams, binds tools and wants JSON of a schema, on both of OpenAI's routes."""
    chat = pytest.importorskip("langchain_openai", reason="langchain-openai is not installed").ChatOpenAI
    tool = {"name": "weather", "description": "Of a city", "parameters": _object(rain={"type": "boolean"})}
    form = {"title": "trip", "description": "A trip"} | _object(city={"enum": ["Paris", "Rome"]})
    for responses in (False, True):
        model = chat(
            model=serving.MODEL, base_url=url, api_key=KEY, temperature=0, max_tokens=60, use_responses_api=responses
        )
        assert model.invoke("Hello").usage_metadata["output_tokens"] > 0
        assert "".join(part.text for part in model.stream("Hello")) == model.invoke("Hello").text
        (call,) = model.bind_tools([tool], tool_choice="any").invoke("Does it rain?").tool_calls
        assert (call["name"], set(call["args"])) == ("weather", {"rain"})
        assert model.with_structured_output(form, method="json_schema").invoke("Where?")["city"] in ("Paris", "Rome")


async def test_inspect_has_its_own_client(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its provider ``openai-api`` talks and demands a call."""
    inspect = pytest.importorskip("inspect_ai.model", reason="inspect_ai is not installed")
    from inspect_ai.tool import ToolInfo, ToolParams
    from inspect_ai.util import JSONSchema

    monkeypatch.setenv("AGENTMEM_API_KEY", KEY)
    monkeypatch.setenv("AGENTMEM_BASE_URL", url)
    config = inspect.GenerateConfig(temperature=0, max_tokens=60)
    async with inspect.get_model(f"openai-api/agentmem/{serving.MODEL}", config=config, memoize=False) as model:
        assert (await model.generate("Hello")).usage.output_tokens > 0
        fields = ToolParams(properties={"rain": JSONSchema(type="boolean")}, required=["rain"])
        tool = ToolInfo(name="weather", description="Of a city", parameters=fields)
        made = await model.generate("Does it rain?", tools=[tool], tool_choice="any")
    (call,) = made.message.tool_calls or ()
    assert (call.function, set(call.arguments)) == ("weather", {"rain"})


def _object(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}
