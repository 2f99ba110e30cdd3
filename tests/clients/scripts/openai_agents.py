"""The `openai-agents` package: tools, an output type and sessions, by chat and by responses."""

import asyncio
import os
from importlib.metadata import version
from typing import Literal

from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    SQLiteSession,
    function_tool,
)
from openai import AsyncOpenAI
from pydantic import BaseModel

MODEL = os.environ["MODEL"]
asked = []


class Verdict(BaseModel):
    likes_it: bool
    city: Literal["Rome", "Paris"]


@function_tool
def get_weather(city: Literal["Rome", "Paris"]) -> str:
    """The weather of a city."""
    asked.append(city)
    return f"It is sunny in {city}."


async def try_model(model) -> None:
    """Two turns of an agent that has to call its tool, and one whose answer is parsed."""
    # The agent sets tool_choice back when a tool has been called, so that it can end.
    settings = ModelSettings(tool_choice="required", temperature=0, max_tokens=200, parallel_tool_calls=False)
    agent = Agent("forecaster", instructions="Help.", model=model, tools=[get_weather], model_settings=settings)
    session = SQLiteSession(type(model).__name__)
    for turn, question in enumerate(("How is the weather in Rome?", "And in Paris?")):
        asked.clear()
        result = await Runner.run(agent, question, session=session, max_turns=4)
        assert asked, "the tool was not called"
        assert result.final_output, result
        first, *others = result.raw_responses
        for before, response in zip([first, *others], others, strict=False):
            known = before.usage.input_tokens + before.usage.output_tokens - 1
            cached = response.usage.input_tokens_details.cached_tokens
            assert cached >= known - 1, f"turn {turn}: {cached} tokens were cached, of {known} that were there"

    asked.clear()
    # The package takes a streamed answer that max_tokens ends for a failure: here the tool's result is the agent's.
    agent = agent.clone(tool_use_behavior="stop_on_first_tool")
    streamed = Runner.run_streamed(agent, "And in Rome again?", session=session, max_turns=4)
    events = [event.type async for event in streamed.stream_events()]
    assert asked and streamed.final_output and "raw_response_event" in events, events

    judge = Agent(
        "judge", model=model, output_type=Verdict, model_settings=ModelSettings(temperature=0, max_tokens=200)
    )
    verdict = (await Runner.run(judge, "Do you like Rome?")).final_output
    assert isinstance(verdict, Verdict), verdict


async def main() -> None:
    client = AsyncOpenAI(max_retries=0)
    for make in (OpenAIChatCompletionsModel, OpenAIResponsesModel):
        await try_model(make(MODEL, client))


asyncio.run(main())
print("openai-agents", version("openai-agents"))
