"""The `smolagents` package: an agent that calls a tool at each step, and an answer in a form."""

import json
import os
from importlib.metadata import version

from smolagents import OpenAIModel, ToolCallingAgent, tool
from smolagents.agents import ActionStep

MODEL = os.environ["MODEL"]
BASE = os.environ["OPENAI_BASE_URL"]
asked = []


@tool
def get_weather(city: str) -> str:
    """The weather of a city.

    Args:
        city: Its name.
    """
    asked.append(city)
    return f"It is sunny in {city}."


model = OpenAIModel(MODEL, api_base=BASE, api_key="none", temperature=0, max_tokens=120)
for streamed in (False, True):
    # A small model may never say that it is done: after the last step smolagents asks it for an answer without tools.
    agent = ToolCallingAgent([get_weather], model, max_steps=2, stream_outputs=streamed, verbosity_level=0)
    answer = agent.run("How is the weather in Rome?")
    steps = [step for step in agent.memory.steps if isinstance(step, ActionStep)]
    called = [call.name for step in steps for call in step.tool_calls or ()]
    assert answer is not None and called and set(called) <= {"get_weather", "final_answer"}, (answer, called)
    assert ("get_weather" in called) == bool(asked), (called, asked)
    assert steps[0].token_usage.output_tokens > 0, steps[0]
    asked.clear()

schema = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "Paris"]}},
    "required": ["city"],
    "additionalProperties": False,
}
form = {"type": "json_schema", "json_schema": {"name": "place", "schema": schema, "strict": True}}
told = model([{"role": "user", "content": [{"type": "text", "text": "Where?"}]}], response_format=form).content
assert json.loads(told)["city"] in ("Rome", "Paris"), told
print("smolagents", version("smolagents"), called)
