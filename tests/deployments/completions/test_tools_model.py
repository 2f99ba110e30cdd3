"""An agent on a model that calls tools by itself: nothing is forced, with the official client, streamed and not."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import AsyncOpenAI

from deployments.ingress import IngressConfig, create_app
from engine.config import EngineConfig
from engine.embedded_model import TOOLS_MODEL_NAME
from tests.deployments.engine_here import EngineHere

MAX_STEPS = 3
WEATHER = {"Paris": "sunny", "Rome": "22 degrees", "Oslo": '{"sky": "rainy"}'}
FUNCTIONS: dict[str, Callable[..., str]] = {
    "get_weather": lambda city: WEATHER[city],
    "get_time": lambda city: f"noon in {city}",
    "add": lambda a, b: str(a + b),
}


def tool(name: str, **parameters: str) -> dict[str, Any]:
    properties = {key: {"type": kind, "title": key.title()} for key, kind in parameters.items()}
    schema = {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}
    return {"type": "function", "function": {"name": name, "description": "A tool.", "parameters": schema}}


TOOLS = {
    "get_weather": tool("get_weather", city="string"),
    "get_time": tool("get_time", city="string"),
    "add": tool("add", a="integer", b="integer"),
}


@pytest.fixture
async def engine() -> AsyncIterator[EngineHere]:
    options = {"model": "embedded-tools", "num_threads": 1, "dtype": "float32", "num_gpu_blocks": 128}
    engine = EngineHere(EngineConfig.from_options(options), stream_interval_s=0.0)
    yield engine
    await engine.check_integrity()
    await engine.__del__()


@pytest.fixture
async def client(engine: EngineHere, tmp_path: Path) -> AsyncIterator[AsyncOpenAI]:
    app = create_app(engine, IngressConfig(store_url=f"sqlite:///{tmp_path / 'c.db'}"), ingress_id="ingress-1")
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost", timeout=None) as http,
    ):
        yield AsyncOpenAI(base_url="http://localhost/v1", api_key="none", http_client=http, max_retries=0)


class Agent:
    """Asks, calls what the model asks for and tells it the results, until it answers in words.

    called: (function, arguments) of all calls so far. usages: of all requests.
    """

    def __init__(self, client: AsyncOpenAI, names: list[str], *, stream: bool) -> None:
        self._client = client
        self._tools: Any = [TOOLS[name] for name in names]
        self._stream = stream
        self._messages: list[Any] = []
        self.called: list[tuple[str, dict[str, Any]]] = []
        self.usages: list[Any] = []

    async def ask(self, text: str) -> str:
        self._messages.append({"role": "user", "content": text})
        for _ in range(MAX_STEPS):
            message = await self._answer()
            self._messages.append(message.model_dump(exclude_none=True))
            if not message.tool_calls:
                return str(message.content)
            for call in message.tool_calls:
                arguments = json.loads(call.function.arguments)
                self.called.append((call.function.name, arguments))
                result = FUNCTIONS[call.function.name](**arguments)
                self._messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
        raise AssertionError(f"it calls and calls: {self.called}")

    async def _answer(self) -> Any:
        body = {"model": TOOLS_MODEL_NAME, "messages": self._messages, "tools": self._tools, "temperature": 0}
        if self._stream:
            async with self._client.chat.completions.stream(stream_options={"include_usage": True}, **body) as events:
                completion: Any = await events.get_final_completion()
        else:
            completion = await self._client.chat.completions.create(**body)
        self.usages.append(completion.usage)
        (choice,) = completion.choices
        assert choice.finish_reason == ("tool_calls" if choice.message.tool_calls else "stop")
        return choice.message


@pytest.mark.parametrize("stream", [False, True])
async def test_it_calls_what_it_is_asked_for_and_tells_what_comes_back(client: AsyncOpenAI, stream: bool) -> None:
    agent = Agent(client, ["get_weather"], stream=stream)
    assert await agent.ask("hello") == "hello! how can I help you?"
    assert agent.called == []
    assert await agent.ask("What is the weather in Paris?") == "here is what I found: sunny"
    assert await agent.ask("what is the weather in Oslo?") == 'here is what I found: {"sky": "rainy"}'
    assert agent.called == [("get_weather", {"city": "Paris"}), ("get_weather", {"city": "Oslo"})]
    for before, usage in pairwise(agent.usages):
        # Of what was said, the last token only is computed again.
        assert usage.prompt_tokens_details.cached_tokens == before.total_tokens - 1


async def test_why_answers_ended_is_counted(client: AsyncOpenAI, engine: EngineHere) -> None:
    agent = Agent(client, ["get_weather"], stream=False)
    await agent.ask("What is the weather in Paris?")
    question: Any = [{"role": "user", "content": "hello"}]
    await client.chat.completions.create(model=TOOLS_MODEL_NAME, messages=question, max_tokens=2)
    statistics = await engine.get_statistics()
    assert statistics["finish_reasons"] == {"stop": 1, "length": 1, "tool_calls": 1}


@pytest.mark.parametrize("stream", [False, True])
async def test_it_makes_two_calls_at_once(client: AsyncOpenAI, stream: bool) -> None:
    agent = Agent(client, ["get_weather"], stream=stream)
    answer = await agent.ask("what is the weather in Paris and in Rome?")
    assert answer.startswith("here is what I found: sunny")
    assert agent.called == [("get_weather", {"city": "Paris"}), ("get_weather", {"city": "Rome"})]
    assert len(agent.usages) == 2


async def test_it_takes_the_tool_that_is_named(client: AsyncOpenAI) -> None:
    agent = Agent(client, ["get_time", "get_weather", "add"], stream=True)
    assert await agent.ask("use get_weather for Paris") == "here is what I found: sunny"
    assert await agent.ask("what is 3 plus 5?") == "here is what I found: 8"
    assert agent.called == [("get_weather", {"city": "Paris"}), ("add", {"a": 3, "b": 5})]
