"""AutoGen: named messages, forced calls, answers in a form, and a team of agents."""

import asyncio
import os
from importlib.metadata import version
from typing import Literal

from autogen_agentchat.agents import AssistantAgent
from autogen_agentchat.conditions import MaxMessageTermination
from autogen_agentchat.messages import StructuredMessage
from autogen_agentchat.teams import RoundRobinGroupChat
from autogen_core.models import (
    AssistantMessage,
    FunctionExecutionResult,
    FunctionExecutionResultMessage,
    ModelInfo,
    UserMessage,
)
from autogen_core.tools import FunctionTool
from autogen_ext.models.openai import OpenAIChatCompletionClient
from pydantic import BaseModel

MODEL = os.environ["MODEL"]


class Place(BaseModel):
    city: Literal["Rome", "Paris"]


async def get_weather(city: Literal["Rome", "Paris"]) -> str:
    """The weather of a city."""
    return f"It is sunny in {city}."


async def loop(client) -> None:
    """A call that is forced, its result, and an answer."""
    tool = FunctionTool(get_weather, "The weather of a city.", strict=True)
    asked = UserMessage(content="How is the weather in Rome?", source="user")
    first = await client.create([asked], tools=[tool], tool_choice="required")
    calls = first.content
    assert first.finish_reason == "function_calls" and calls[0].name == "get_weather", first
    results = [
        FunctionExecutionResult(
            content=await get_weather(**Place.model_validate_json(call.arguments).model_dump()),
            call_id=call.id,
            name=call.name,
            is_error=False,
        )
        for call in calls
    ]
    history = [asked, AssistantMessage(content=calls, source="agent"), FunctionExecutionResultMessage(content=results)]
    second = await client.create(history, tools=[tool], tool_choice="none")
    assert isinstance(second.content, str) and second.content, second
    async for piece in client.create_stream([asked], tools=[tool], tool_choice="required"):
        last = piece
    assert [call.arguments for call in last.content] == [call.arguments for call in calls], (first, last)


async def main() -> None:
    info = ModelInfo(
        vision=False,
        function_calling=True,
        json_output=True,
        family="unknown",
        structured_output=True,
        multiple_system_messages=True,
    )
    client = OpenAIChatCompletionClient(
        model=MODEL, api_key="none", base_url=os.environ["OPENAI_BASE_URL"], model_info=info, temperature=0, max_tokens=200,
        parallel_tool_calls=False, max_retries=0,
    )  # fmt: skip
    await loop(client)
    # Each agent sends its name with its messages.
    team = RoundRobinGroupChat(
        [AssistantAgent(name, client, system_message="Help.", tools=[get_weather]) for name in ("Ada", "Alan")],
        termination_condition=MaxMessageTermination(3),
    )
    told = await team.run(task="Say hello to each other.")
    assert [message.source for message in told.messages][:2] == ["user", "Ada"], told
    judge = AssistantAgent("judge", client, system_message="Help.", output_content_type=Place)
    told = (await judge.run(task="Rome or Paris?")).messages[-1]
    assert isinstance(told, StructuredMessage) and isinstance(told.content, Place), told
    await client.close()


asyncio.run(main())
print("autogen-ext", version("autogen-ext"))
