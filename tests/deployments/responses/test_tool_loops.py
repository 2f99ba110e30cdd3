"""Loops of calls through an engine and a store: by the server's history and by the client's, and after a restart."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import agents
import httpx
import openai
import pytest
from openai import AsyncOpenAI
from pydantic import BaseModel

from deployments.ingress import IngressConfig, create_app
from deployments.tenants import TenantConfig, hash_key
from engine.config import EngineConfig
from tests.deployments.engine_here import EngineHere

MODEL = "pensieve-recall-0.6m"
CITY = {"type": "object", "properties": {"city": {"enum": ["Rome", "Paris"]}}, "required": ["city"]}
TOOLS = [{"type": "function", "name": name, "description": "d", "parameters": CITY} for name in ("weather", "time")]


class Application:
    """An engine and an application in front of it, and a client of each kind. Each start is a new engine."""

    def __init__(self, url: str, **options: Any) -> None:
        self._config = IngressConfig(store_url=url, **options)
        self._stack = AsyncExitStack()

    async def start(self) -> None:
        options = {"num_threads": 1, "dtype": "float32", "num_gpu_blocks": 256, "max_model_len": 2048}
        self.engine = EngineHere(EngineConfig.from_options(options), stream_interval_s=0.0)
        self._stack.push_async_callback(self.engine.__del__)
        self._stack.push_async_callback(self.engine.check_integrity)
        app = create_app(self.engine, self._config, ingress_id="ingress-1")
        await self._stack.enter_async_context(app.router.lifespan_context(app))
        self.http = await self._stack.enter_async_context(
            httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost", timeout=None)
        )
        self.client = AsyncOpenAI(base_url="http://localhost/v1", api_key="none", http_client=self.http, max_retries=0)

    async def stop(self) -> None:
        await self._stack.aclose()


@pytest.fixture
async def app(tmp_path: Path) -> AsyncIterator[Application]:
    app = Application(f"sqlite:///{tmp_path / 'conversations.db'}")
    await app.start()
    yield app
    await app.stop()


async def ask(client: AsyncOpenAI, *, stream: bool = False, **asked: Any) -> Any:
    asked = {"model": MODEL, "temperature": 0, "max_output_tokens": 200} | asked
    if not stream:
        return await client.responses.create(**asked)
    async with client.responses.stream(**asked) as events:
        async for _ in events:
            pass
        return await events.get_final_response()


def rewritten(item: Any) -> dict[str, Any]:
    """A call as many clients send it back: with other white space in its arguments."""
    return item.model_dump() | {"arguments": json.dumps(json.loads(item.arguments), indent=2)}


async def loop_of_calls(client: AsyncOpenAI, how: str, *, stream: bool, user: str = "") -> list[Any]:
    """Three turns, each of which has to call something, and whose history is kept as `how` says."""
    told: list[Any] = []
    items: list[Any] = [{"role": "user", "content": user or how}]
    new, options = items, {}
    if how == "conversation":
        options = {"conversation": (await client.conversations.create()).id}
    for turn in range(3):
        response = await ask(
            client,
            stream=stream,
            input=items if how.startswith("items") else new,
            tools=TOOLS,
            tool_choice=({"type": "function", "name": "time"}, "required")[turn % 2],
            parallel_tool_calls=False,
            store=how != "items of a client that stores nothing",
            **options,
        )
        (item,) = response.output
        assert (item.type, item.status, response.status) == ("function_call", "completed", "completed")
        assert json.loads(item.arguments) in ({"city": "Rome"}, {"city": "Paris"})
        new = [{"type": "function_call_output", "call_id": item.call_id, "output": f"result {turn}"}]
        sent = rewritten(item) if turn % 2 else item.to_dict()
        if how == "items by reference":
            sent = {"type": "item_reference", "id": item.id}
        items = [*items, sent, *new]
        if how == "previous response":
            options = {"previous_response_id": response.id}
        told.append((item, response))
    return told


LOOPS = (
    "previous response",
    "conversation",
    "items",
    "items by reference",
    "items of a client that stores nothing",
)


@pytest.mark.parametrize("how", LOOPS)
async def test_a_loop_of_calls_computes_only_what_is_new(app: Application, how: str) -> None:
    told = await loop_of_calls(app.client, how, stream=how in LOOPS[1::2])
    for (_, before), (_, now) in pairwise(told):
        kept = before.usage.total_tokens - 1  # the last token was never computed
        assert now.usage.input_tokens_details.cached_tokens >= kept


async def test_a_history_makes_the_same_calls_whether_server_or_client_keeps_it(app: Application) -> None:
    user = "my cat is called Mia"
    kept = await loop_of_calls(app.client, "previous response", stream=False, user=user)
    sent = await loop_of_calls(app.client, "items", stream=True, user=user)
    assert [(item.name, item.arguments) for item, _ in kept] == [(item.name, item.arguments) for item, _ in sent]


async def test_what_was_called_is_kept_listed_and_deleted(app: Application) -> None:
    conversation = await app.client.conversations.create(metadata={"k": "v"})
    called = await ask(
        app.client,
        input="hi",
        tools=TOOLS,
        tool_choice="required",
        parallel_tool_calls=False,
        conversation=conversation.id,
    )
    (item,) = called.output
    output = {
        "type": "function_call_output",
        "call_id": item.call_id,
        "output": [{"type": "input_text", "text": "sunny"}],
    }
    answered = await ask(app.client, input=[output], tools=TOOLS, tool_choice="none", conversation=conversation.id)
    assert [each.type for each in answered.output] == ["message"]
    assert (await app.client.responses.retrieve(called.id)).output == [item]
    listed = (await app.client.responses.input_items.list(answered.id)).data
    assert [(each.type, each.call_id, each.output[0].text) for each in listed] == [
        ("function_call_output", item.call_id, "sunny")
    ]
    kept = (await app.client.conversations.items.list(conversation.id, order="asc")).data
    assert [each.type for each in kept] == ["message", "function_call", "function_call_output", "message"]
    assert kept[1].to_dict() == item.to_dict()
    one = await app.client.conversations.items.retrieve(item.id, conversation_id=conversation.id)
    assert one.to_dict() == item.to_dict()
    added = await app.client.conversations.items.create(
        conversation.id, items=[item.to_dict(), output, {"type": "reasoning", "id": "rs_1", "summary": []}]
    )
    assert [each.type for each in added.data] == ["function_call", "function_call_output", "reasoning"]
    for each in (item, added.data[0]):
        await app.client.conversations.items.delete(each.id, conversation_id=conversation.id)
    assert len((await app.client.conversations.items.list(conversation.id)).data) == 5
    assert (await ask(app.client, input="go on", conversation=conversation.id)).status == "completed"


async def test_a_loop_goes_on_after_a_restart_of_everything(app: Application) -> None:
    """The ids that were generated come from the store."""
    asked: dict[str, Any] = {"tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False}
    called = await ask(app.client, input="hi", **asked)
    output = [{"type": "function_call_output", "call_id": called.output[0].call_id, "output": "sunny"}]
    undisturbed = await ask(app.client, input=output, previous_response_id=called.id, **asked)
    await app.stop()
    await app.start()
    again = await ask(app.client, input=output, previous_response_id=called.id, stream=True, **asked)
    assert (again.output[0].name, again.output[0].arguments) == (
        undisturbed.output[0].name,
        undisturbed.output[0].arguments,
    )
    assert again.usage.input_tokens == undisturbed.usage.input_tokens
    assert again.usage.input_tokens_details.cached_tokens == 0
    by_items = [{"role": "user", "content": "hi"}, {"type": "item_reference", "id": called.output[0].id}, *output]
    assert (await ask(app.client, input=by_items, **asked)).output[0].arguments == undisturbed.output[0].arguments


async def test_an_answer_that_is_cut_in_a_call_is_incomplete(app: Application) -> None:
    asked: dict[str, Any] = {"tools": TOOLS, "tool_choice": "required", "max_output_tokens": 45}
    for stream in (False, True):
        cut = await ask_to_the_end(app.client, stream=stream, input="hi", **asked)
        assert cut.status == "incomplete"
        assert cut.incomplete_details.reason == "max_output_tokens"
        assert [(item.type, item.status) for item in cut.output] == [("function_call", "incomplete")]
    assert (await ask(app.client, input="go on", previous_response_id=cut.id)).status == "completed"


async def ask_to_the_end(client: AsyncOpenAI, *, stream: bool, **asked: Any) -> Any:
    """The response also of a stream that does not end with response.completed."""
    if not stream:
        return await ask(client, **asked)
    events = await client.responses.create(model=MODEL, temperature=0, stream=True, **asked)
    return [event async for event in events][-1].response


# -- references --------------------------------------------------------------------------------------------------------


async def test_a_reference_stands_for_the_item(app: Application) -> None:
    first = await ask(app.client, input="my cat is called Mia")
    (message,) = first.output
    user = (await app.client.responses.input_items.list(first.id)).data[0]
    question = {"role": "user", "content": "what is my cat called?"}
    said = [{"role": "user", "content": "my cat is called Mia"}, {"role": "assistant", "content": first.output_text}]
    told = await ask(app.client, input=[*said, question])
    referred = await ask(app.client, input=[{"type": "item_reference", "id": user.id}, {"id": message.id}, question])
    assert referred.output_text == told.output_text
    assert "Mia" in referred.output_text
    assert referred.usage.input_tokens == told.usage.input_tokens
    assert referred.usage.input_tokens_details.cached_tokens >= first.usage.total_tokens - 1
    listed = (await app.client.responses.input_items.list(referred.id, order="asc")).data
    assert [item.content[0].text for item in listed] == [
        "my cat is called Mia",
        first.output_text,
        "what is my cat called?",
    ]
    assert not {item.id for item in listed} & {user.id, message.id}


@pytest.mark.parametrize("item_id", ["msg_none", "x" * 400, "\x00", ""])
async def test_a_reference_to_nothing_is_not_found(app: Application, item_id: str) -> None:
    for store in (True, False):
        with pytest.raises(openai.NotFoundError) as caught:
            await ask(app.client, input=[{"type": "item_reference", "id": item_id}], store=store)
        assert caught.value.param == "input"


async def test_what_is_deleted_is_referred_to_no_more(app: Application) -> None:
    first = await ask(app.client, input="my cat is called Mia")
    await ask(app.client, input="what is my cat called?", previous_response_id=first.id)  # so that its items stay
    await app.client.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError):
        await ask(app.client, input=[{"type": "item_reference", "id": first.output[0].id}])


async def test_what_is_referred_to_is_bounded(app: Application) -> None:
    conversation = await app.client.conversations.create()
    ids = []
    for _ in range(2):
        (added,) = (
            await app.client.conversations.items.create(
                conversation.id, items=[{"role": "user", "content": "x" * 1_500_000}]
            )
        ).data
        ids.append(added.id)
    with pytest.raises(openai.BadRequestError) as caught:
        await ask(app.client, input=[{"type": "item_reference", "id": each} for each in ids])
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "input")


async def test_items_of_others_do_not_exist(tmp_path: Path) -> None:
    tenants = tuple(TenantConfig(id=name, api_keys_sha256=(hash_key(f"sk-{name}"),)) for name in "ab")
    app = Application(f"sqlite:///{tmp_path / 'conversations.db'}", tenants=tenants)
    await app.start()
    try:
        one, other = (app.client.with_options(api_key=f"sk-{name}") for name in "ab")
        first = await ask(one, input="my cat is called Mia")
        with pytest.raises(openai.NotFoundError):
            await ask(other, input=[{"type": "item_reference", "id": first.output[0].id}])
        stolen = await ask(other, input=[first.output[0].to_dict(), {"role": "user", "content": "hi"}])
        assert stolen.usage.input_tokens_details.cached_tokens == 0
    finally:
        await app.stop()


# -- what else the SDK does --------------------------------------------------------------------------------------------


class City(BaseModel):
    city: Literal["Rome", "Paris"]


async def test_answers_and_arguments_are_parsed_to_models(app: Application) -> None:
    parsed = await app.client.responses.parse(model=MODEL, input="where?", text_format=City, temperature=0)
    assert parsed.output_parsed == City.model_validate_json(parsed.output_text)
    assert parsed.text.format.type == "json_schema"
    async with app.client.responses.stream(model=MODEL, input="where?", text_format=City, temperature=0) as events:
        done = [event async for event in events if event.type == "response.output_text.done"]
        final = await events.get_final_response()
    assert done[0].parsed == final.output_parsed == parsed.output_parsed
    tool = openai.pydantic_function_tool(City)["function"]
    called = await app.client.responses.parse(
        model=MODEL,
        input="where?",
        tools=[{"type": "function", **tool}],
        tool_choice="required",
        parallel_tool_calls=False,
        temperature=0,
    )
    assert called.output[0].parsed_arguments in ({"city": "Rome"}, {"city": "Paris"})
    again = await ask(
        app.client,
        input=[
            {"role": "user", "content": "where?"},
            *(item.model_dump() for item in called.output),  # with what the client parsed
            *({"type": "function_call_output", "call_id": item.call_id, "output": "yes"} for item in called.output),
        ],
        tools=[{"type": "function", **tool}],
    )
    assert again.status == "completed"


async def test_a_json_object_is_one(app: Application) -> None:
    answer = await ask(app.client, input="where?", text={"format": {"type": "json_object"}}, max_output_tokens=60)
    if answer.status == "completed":
        assert isinstance(json.loads(answer.output_text), dict)
    assert answer.output_text.startswith("{")


async def test_a_schema_that_cannot_be_enforced_is_refused_by_its_name_here(app: Application) -> None:
    schema = {"type": "object", "not": {}}
    with pytest.raises(openai.BadRequestError) as caught:
        await ask(
            app.client,
            input="x",
            text={"format": {"type": "json_schema", "name": "n", "strict": True, "schema": schema}},
        )
    assert caught.value.param == "text.format"
    with pytest.raises(openai.BadRequestError) as caught:
        await ask(app.client, input="x", tools=[TOOLS[0] | {"strict": True, "parameters": schema}])
    assert caught.value.param == "tools"


async def test_a_stored_response_is_streamed_again(app: Application) -> None:
    called = await ask(app.client, input="hi", tools=TOOLS, tool_choice="required", parallel_tool_calls=False)
    async with app.client.responses.stream(response_id=called.id) as events:
        types = [event.type async for event in events]
        final = await events.get_final_response()
    assert [item.arguments for item in final.output] == [item.arguments for item in called.output]
    assert types[0] == "response.created"
    rest = await app.client.responses.retrieve(called.id, stream=True, starting_after=len(types) - 2)
    assert [event.type async for event in rest] == ["response.completed"]


async def test_the_input_is_counted_and_nothing_is_kept(app: Application) -> None:
    count = app.client.responses.input_tokens.count
    asked: dict[str, Any] = {
        "tools": TOOLS,
        "instructions": "Be brief.",
        "tool_choice": "required",
        "parallel_tool_calls": False,
    }
    counted = await count(model=MODEL, input="hi", **asked)
    first = await ask(app.client, input="hi", **asked)
    assert counted.input_tokens == first.usage.input_tokens
    output = [{"type": "function_call_output", "call_id": first.output[0].call_id, "output": "sunny"}]
    counted = await count(model=MODEL, input=output, previous_response_id=first.id, **asked)
    second = await ask(app.client, input=output, previous_response_id=first.id, **asked)
    assert counted.input_tokens == second.usage.input_tokens
    with pytest.raises(openai.NotFoundError):
        await count(model="another", input="hi")


async def test_compaction_is_refused_in_plain_words(app: Application) -> None:
    with pytest.raises(openai.NotFoundError, match="truncation: auto"):
        await app.client.responses.compact(model=MODEL, input="hi")


async def test_an_agent_calls_a_function_and_answers(app: Application) -> None:
    cities: list[str] = []

    @agents.function_tool
    def weather(city: Literal["Rome", "Paris"]) -> str:
        """The weather in a city."""
        cities.append(city)
        return f"sunny in {city}"

    model = agents.OpenAIResponsesModel(model=MODEL, openai_client=app.client)
    settings = agents.ModelSettings(
        tool_choice="required",
        temperature=0,
        parallel_tool_calls=False,
        response_include=["reasoning.encrypted_content"],
        verbosity="low",
    )
    agent = agents.Agent(name="a", model=model, tools=[weather], model_settings=settings)
    config = agents.RunConfig(tracing_disabled=True)
    result = await agents.Runner.run(
        agent, "how is the weather?", run_config=config, session=agents.SQLiteSession("weather")
    )
    assert isinstance(result.final_output, str)
    streamed = agents.Runner.run_streamed(
        agent, "how is the weather?", run_config=config, auto_previous_response_id=True
    )
    names = [event.name async for event in streamed.stream_events() if event.type == "run_item_stream_event"]
    assert names[:2] == ["tool_called", "tool_output"]
    assert len(cities) == 2
