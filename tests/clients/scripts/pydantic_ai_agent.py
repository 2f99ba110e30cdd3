"""The `pydantic-ai` package: an agent's loop of calls, and its three modes of structured output."""

import os
from importlib.metadata import version
from typing import Literal

from pydantic import BaseModel, Field
from pydantic_ai import Agent, NativeOutput, PromptedOutput, ToolOutput
from pydantic_ai.exceptions import UnexpectedModelBehavior
from pydantic_ai.messages import ModelResponse, ToolCallPart, ToolReturnPart
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel

MODEL = os.environ["MODEL"]


class Person(BaseModel):
    name: Literal["Ada", "Alan"]
    age: int = Field(ge=1, le=99)


def settings(context):
    """The first step of a run has to call a tool, the second one may not."""
    more = {"tool_choice": "required" if context.run_step == 1 else "none"}
    return {"temperature": 0, "max_tokens": 200, "parallel_tool_calls": False, **more}


def check_loop(messages, asked):
    """The tool ran with arguments that validate, the loop ended, and its second step found the first one in the cache."""
    assert asked and set(asked) <= {"Rome", "Paris"}, asked
    parts = [part for message in messages for part in message.parts]
    assert any(isinstance(part, ToolCallPart) for part in parts) and any(
        isinstance(part, ToolReturnPart) for part in parts
    )
    first, second = [message.usage for message in messages if isinstance(message, ModelResponse)][-2:]
    assert second.cache_read_tokens >= first.input_tokens + first.output_tokens - 2, (first, second)


for model in (OpenAIChatModel(MODEL), OpenAIResponsesModel(MODEL)):
    asked = []
    agent = Agent(model, instructions="Help.", model_settings=settings)

    @agent.tool_plain
    def get_weather(city: Literal["Rome", "Paris"]) -> str:
        """The weather of a city."""
        asked.append(city)  # noqa: B023
        return f"It is sunny in {city}."

    first = agent.run_sync("How is the weather in Rome?")
    check_loop(first.all_messages(), asked)
    asked.clear()
    second = agent.run_sync("And in Paris?", message_history=first.all_messages())
    check_loop(second.all_messages(), asked)
    asked.clear()
    with agent.run_stream_sync("And in Rome?", message_history=second.all_messages()) as streamed:
        assert list(streamed.stream_text(delta=True))
        check_loop(streamed.all_messages(), asked)

    for output in (ToolOutput(Person), NativeOutput(Person, strict=True)):
        told = Agent(model, output_type=output, model_settings={"temperature": 0, "max_tokens": 200}).run_sync(
            "Who are you?"
        )
        assert isinstance(told.output, Person), told
    # Here the answer is only held to JSON, which a small model may never end: what matters is that it is asked and answered.
    try:
        prompted = Agent(model, output_type=PromptedOutput(dict), model_settings={"temperature": 0, "max_tokens": 400})
        assert isinstance(prompted.run_sync("An empty object: {}").output, dict)
    except UnexpectedModelBehavior as error:
        assert "retries" in str(error), error
print("pydantic-ai", version("pydantic-ai-slim"), second.usage)
