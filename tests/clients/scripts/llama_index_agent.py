"""LlamaIndex: forced calls, an agent's loop, structured output, by chat and by responses."""

import asyncio
import os
from importlib.metadata import version
from typing import Literal

from llama_index.core.agent.workflow import FunctionAgent, ToolCallResult
from llama_index.core.llms import ChatMessage
from llama_index.core.prompts import PromptTemplate
from llama_index.core.tools import FunctionTool
from llama_index.core.workflow import Context
from llama_index.llms.openai_like import OpenAILike, OpenAILikeResponses
from pydantic import BaseModel, Field

MODEL = os.environ["MODEL"]
asked = []


class Person(BaseModel, extra="forbid"):
    """A person."""

    name: Literal["Ada", "Alan"]
    age: int = Field(ge=1, le=99)


def get_weather(city: Literal["Rome", "Paris"]) -> str:
    """The weather of a city."""
    asked.append(city)
    return f"It is sunny in {city}."


async def two_turns(llm, tool) -> None:
    """An agent whose first step of a run has to call the tool."""
    agent = FunctionAgent(
        tools=[tool], llm=llm, system_prompt="Help.", initial_tool_choice="required", allow_parallel_tool_calls=False
    )
    context = Context(agent)
    for question in ("How is the weather in Rome?", "And in Paris?"):
        handler = agent.run(question, ctx=context, max_iterations=4)
        results = [event async for event in handler.stream_events() if isinstance(event, ToolCallResult)]
        answer = await handler
        assert asked and set(asked) <= {"Rome", "Paris"} and len(results) == len(asked), (asked, results)
        assert answer.response.content, answer
        asked.clear()


options = {
    "model": MODEL,
    "api_base": os.environ["OPENAI_BASE_URL"],
    "api_key": "none",
    "temperature": 0,
    "max_retries": 0,
}
chat = OpenAILike(is_chat_model=True, is_function_calling_model=True, max_tokens=200, context_window=4096, **options)
responses = OpenAILikeResponses(is_function_calling_model=True, max_output_tokens=200, context_window=4096, **options)
tool = FunctionTool.from_defaults(get_weather)
for llm in (chat, responses):
    called = llm.chat_with_tools([tool], user_msg="How is the weather in Rome?", tool_required=True)
    (selection,) = llm.get_tool_calls_from_response(called)
    assert selection.tool_name == "get_weather" and selection.tool_kwargs["city"] in ("Rome", "Paris"), selection
    *_, last = llm.stream_chat_with_tools([tool], user_msg="How is the weather in Rome?", tool_required=True)
    (again,) = llm.get_tool_calls_from_response(last)
    assert again.tool_kwargs == selection.tool_kwargs, (selection, again)
    asyncio.run(two_turns(llm, tool))
    told = llm.structured_predict(Person, PromptTemplate("{name} is 30 years old."), name="Ada")
    assert isinstance(told, Person), told
    assert llm.chat([ChatMessage("Hello!")]).message.content
print("llama-index-llms-openai-like", version("llama-index-llms-openai-like"), told)
