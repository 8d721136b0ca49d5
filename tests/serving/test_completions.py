"""Completions: a text goes on without a template, and nothing of it is held."""

from __future__ import annotations

import json
from typing import Any

import pytest
from openai.types import Completion

from support import serving, tiny_chat

ROUTE = "/v1/completions"


def body(prompt: Any, **fields: Any) -> dict[str, Any]:
    """The body of a completion, greedy."""
    return {"model": serving.MODEL, "prompt": prompt, "temperature": 0, "max_tokens": 6} | fields


async def test_a_completion_is_what_a_session_writes_after_a_text() -> None:
    """As a text, in a list, as ids and streamed; longer than the cap, too. Nothing is held afterwards."""
    of = serving.server()
    async with serving.client(of) as http:
        for text in ("Once upon a time", "Once upon a time " * 10):
            ids = tiny_chat.tokenizer()(text)["input_ids"]
            with of.runtime.session(seed=0) as session:
                for start in range(0, len(ids), 256):
                    session.read(ids[start : start + 256])
                expected = session.generate(max_new_tokens=6, do_sample=False).text
            for prompt in (text, [text], ids):
                answer = await http.post(ROUTE, json=body(prompt))
                made = Completion.model_validate(answer.json(), strict=True)
                assert (made.choices[0].text, made.choices[0].finish_reason) == (expected, "length")
                assert made.usage is not None
                assert (made.usage.prompt_tokens, made.usage.completion_tokens) == (len(ids), 6)
            answer = await http.post(ROUTE, json=body(text, stream=True, stream_options={"include_usage": True}))
            lines = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
            *pieces, last = [json.loads(line) for line in lines[:-1]]
            assert lines[-1] == "[DONE]"
            assert "".join(piece["choices"][0]["text"] for piece in pieces) == expected
            assert last["usage"]["total_tokens"] == len(ids) + 6
        assert (len(of.conversations), len(of.runtime.sessions)) == (0, 0)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ["a", "b"]}, "prompt"),
        ({"prompt": "\ud800"}, "prompt"),
        ({"echo": True}, "echo"),
        ({"best_of": 2}, "best_of"),
        ({"suffix": "x"}, "suffix"),
        ({"logprobs": 3}, "logprobs"),
        ({"prompt": [5, 10**9]}, None),
    ],
)
async def test_what_cannot_be_served_is_refused_by_name(fields: dict[str, Any], param: str | None) -> None:
    """With the error object and the field; ids that the model does not know by their own words."""
    of = serving.server()
    async with serving.client(of) as http:
        answer = await http.post(
            ROUTE, content=json.dumps(body("x") | fields), headers={"Content-Type": "application/json"}
        )
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
        assert of.runtime.sessions == []
