"""The `anthropic` package: messages, streams, a loop of tool calls, counted tokens, errors."""

import os

import anthropic

MODEL = os.environ["MODEL"]
client = anthropic.Anthropic(max_retries=0)
TOOLS = [
    {
        "name": "get_weather",
        "description": "The weather of a city.",
        "input_schema": {
            "type": "object",
            "properties": {"city": {"type": "string", "enum": ["Rome", "Paris"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    }
]
SYSTEM = [{"type": "text", "text": "You forecast the weather.", "cache_control": {"type": "ephemeral"}}]
GREEDY = {"temperature": 0}  # which this version of the package has no parameter for
options = {"model": MODEL, "max_tokens": 200, "system": SYSTEM, "tools": TOOLS, "extra_body": GREEDY}


def ask(messages, streamed, **more):
    """The message, however it is told."""
    if not streamed:
        return client.messages.create(messages=messages, **options, **more)
    with client.messages.stream(messages=messages, **options, **more) as stream:
        types = [event.type for event in stream]
        message = stream.get_final_message()
    assert types[0] == "message_start" and types[-1] == "message_stop", types
    return message


def num_tokens(usage):
    """Of the whole prompt."""
    return usage.input_tokens + (usage.cache_read_input_tokens or 0) + (usage.cache_creation_input_tokens or 0)


for streamed in (False, True):
    messages = [{"role": "user", "content": f"How is the weather in Rome? ({streamed})"}]
    choice = {"type": "tool", "name": "get_weather", "disable_parallel_tool_use": True}
    first = ask(messages, streamed, tool_choice=choice)
    assert first.stop_reason == "tool_use", first
    (call,) = [block for block in first.content if block.type == "tool_use"]
    assert call.name == "get_weather" and call.input["city"] in ("Rome", "Paris"), call
    result = {"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": "sunny"}]}
    messages += [{"role": "assistant", "content": first.content}, {"role": "user", "content": [result]}]
    second = ask(messages, streamed, tool_choice={"type": "none"})
    assert second.stop_reason in ("end_turn", "max_tokens") and second.content[0].text, second
    known = num_tokens(first.usage) + first.usage.output_tokens - 1
    assert second.usage.cache_read_input_tokens >= known - 1, (first.usage, second.usage)

hello = {"model": MODEL, "messages": [{"role": "user", "content": "Hello!"}]}
assert client.messages.count_tokens(**hello).input_tokens == num_tokens(
    client.messages.create(max_tokens=1, **hello).usage
)
with client.messages.stream(max_tokens=16, **hello) as stream:
    told = "".join(stream.text_stream)
assert told == stream.get_final_message().content[0].text

try:
    client.messages.create(max_tokens=-1, **hello)
except anthropic.BadRequestError as error:
    assert error.body["type"] == "error" and error.body["error"]["type"] == "invalid_request_error", error.body
else:
    raise AssertionError("a negative max_tokens was accepted")
print("anthropic", anthropic.__version__, second.usage)
