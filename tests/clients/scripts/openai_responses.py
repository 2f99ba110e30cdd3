"""The `openai` package: responses with tools, parsed answers, streams and conversations."""

import json
import os
from typing import Literal

import openai
from pydantic import BaseModel

MODEL = os.environ["MODEL"]
client = openai.OpenAI(max_retries=0)
TOOLS = [
    {
        "type": "function",
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "enum": ["Rome", "Paris"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
        "strict": True,
    }
]
options = {"model": MODEL, "temperature": 0, "max_output_tokens": 200, "tools": TOOLS, "parallel_tool_calls": False}


class Verdict(BaseModel, extra="forbid"):
    likes_it: bool
    city: Literal["Rome", "Paris"]


def weather(call):
    """The result of a call, as the item that goes back."""
    arguments = json.loads(call.arguments)
    assert call.name == "get_weather" and arguments["city"] in ("Rome", "Paris"), call
    return {
        "type": "function_call_output",
        "call_id": call.call_id,
        "output": json.dumps({"weather": "sunny"} | arguments),
    }


# A loop in which the server keeps the history.
first = client.responses.create(input="How is the weather in Rome?", tool_choice="required", **options)
(call,) = [item for item in first.output if item.type == "function_call"]
second = client.responses.create(input=[weather(call)], tool_choice="none", previous_response_id=first.id, **options)
assert second.status in ("completed", "incomplete") and second.output_text, second
known = first.usage.input_tokens + first.usage.output_tokens - 1
assert second.usage.input_tokens_details.cached_tokens >= known - 1, (first.usage, second.usage)

# The same by a client that keeps it itself and sends the items back as the objects that they came in.
question = {"role": "user", "content": "How is the weather in Paris?"}
named = {"type": "function", "name": "get_weather"}
with client.responses.stream(input=[question], tool_choice=named, store=False, **options) as stream:
    told = "".join(event.delta for event in stream if event.type == "response.function_call_arguments.delta")
    first = stream.get_final_response()
(call,) = [item for item in first.output if item.type == "function_call"]
assert told == call.arguments
history = [question, *first.output, weather(call)]
with client.responses.stream(input=history, tool_choice="none", store=False, **options) as stream:
    told = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
    second = stream.get_final_response()
assert told == second.output_text != ""
known = first.usage.input_tokens + first.usage.output_tokens - 1
assert second.usage.input_tokens_details.cached_tokens >= known - 1, (first.usage, second.usage)

# A loop in a conversation; its items can be listed.
conversation = client.conversations.create()
first = client.responses.create(input="And in Rome?", tool_choice=named, conversation=conversation.id, **options)
(call,) = [item for item in first.output if item.type == "function_call"]
client.responses.create(input=[weather(call)], tool_choice="none", conversation=conversation.id, **options)
types = {item.type for item in client.conversations.items.list(conversation.id)}
assert types >= {"message", "function_call", "function_call_output"}, types
client.conversations.delete(conversation.id)

parsed = client.responses.parse(
    model=MODEL, input="Do you like Rome?", text_format=Verdict, max_output_tokens=100, temperature=0
)
assert isinstance(parsed.output_parsed, Verdict), parsed
assert client.responses.retrieve(parsed.id).output_text == parsed.output_text
again = [
    event for event in client.responses.retrieve(parsed.id, stream=True) if event.type == "response.output_text.done"
]
assert [event.text for event in again] == [parsed.output_text], again
assert client.responses.input_tokens.count(model=MODEL, input="Do you like Rome?").input_tokens > 3
print("openai", openai.__version__, second.usage, parsed.output_parsed)
