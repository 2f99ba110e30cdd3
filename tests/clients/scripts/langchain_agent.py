"""LangChain and LangGraph: calls, an agent with memory, structured output, named messages, batches."""

import json
import os
from contextlib import suppress
from importlib.metadata import version
from typing import Literal

from langchain.agents import create_agent
from langchain.agents.middleware import wrap_model_call
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI
from langgraph.checkpoint.memory import MemorySaver
from openai import LengthFinishReasonError
from pydantic import BaseModel, Field

MODEL = os.environ["MODEL"]
asked = []


class Person(BaseModel):
    """A person."""

    name: Literal["Ada", "Alan"]
    age: int = Field(ge=1, le=99)


@tool
def get_weather(city: Literal["Rome", "Paris"]) -> str:
    """The weather of a city."""
    asked.append(city)
    return f"It is sunny in {city}."


@wrap_model_call
def force_first_call(request, handler):
    """A model that a user has just spoken to has to call a tool, one that has a result may not."""
    choice = "none" if isinstance(request.messages[-1], ToolMessage) else "required"
    return handler(request.override(tool_choice=choice, model_settings={"parallel_tool_calls": False}))


def check_loop(messages):
    """The tool ran, the loop ended with an answer, and its second step found the first one in the cache."""
    assert asked and set(asked) <= {"Rome", "Paris"}, asked
    assert isinstance(messages[-1], AIMessage) and messages[-1].text and not messages[-1].tool_calls, messages
    assert isinstance(messages[-2], ToolMessage), messages
    first, second = [message.usage_metadata for message in messages if isinstance(message, AIMessage)][-2:]
    cached = second["input_token_details"]["cache_read"]
    assert cached >= first["input_tokens"] + first["output_tokens"] - 2, (first, second)
    asked.clear()


for uses_responses in (False, True):
    llm = ChatOpenAI(
        model=MODEL, temperature=0, max_tokens=200, use_responses_api=uses_responses, max_retries=0, stream_usage=True
    )
    bound = llm.bind_tools([get_weather], tool_choice="any", strict=True, parallel_tool_calls=False)
    (call,) = bound.invoke("How is the weather in Rome?").tool_calls
    assert call["name"] == "get_weather" and call["args"]["city"] in ("Rome", "Paris"), call
    whole = None
    for piece in bound.stream("How is the weather in Rome?"):
        whole = piece if whole is None else whole + piece
    assert [told["args"] for told in whole.tool_calls] == [call["args"]], whole

    agent = create_agent(
        llm, [get_weather], system_prompt="Help.", middleware=[force_first_call], checkpointer=MemorySaver()
    )
    thread = {"configurable": {"thread_id": "1"}, "recursion_limit": 12}
    for question in ("How is the weather in Rome?", "And in Paris?"):
        check_loop(agent.invoke({"messages": [HumanMessage(question)]}, thread)["messages"])
    for update in agent.stream({"messages": [HumanMessage("And in Rome?")]}, thread, stream_mode="values"):
        last = update["messages"]
    check_loop(last)

    for method in ("function_calling", "json_schema"):
        told = llm.with_structured_output(Person, method=method).invoke("Ada is 30 years old.")
        assert isinstance(told, Person), (method, told)

llm = ChatOpenAI(model=MODEL, temperature=0, max_tokens=300, max_retries=0)
with suppress(LengthFinishReasonError):  # a small model may not end its object: the mode is answered, which counts
    told = llm.bind(response_format={"type": "json_object"}).invoke("An empty JSON object: {}")
    assert isinstance(json.loads(told.text), dict), told
# Agents that speak with each other have names.
assert llm.invoke(
    [SystemMessage("Help."), HumanMessage("Hello!", name="Ada"), AIMessage("Hi!", name="Alan"), HumanMessage("So?")]
).text
batch = OpenAI(model=MODEL, temperature=0, max_tokens=8, max_retries=0).batch(["Once", "Twice", "Once"])
assert len(batch) == 3 and batch[0] == batch[2], batch
print("langchain-openai", version("langchain-openai"), "langgraph", version("langgraph"))
