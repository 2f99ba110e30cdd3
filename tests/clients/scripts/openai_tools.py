"""The `openai` package: a loop of tool calls in chat, whole and streamed, and what is cached."""

import json
import os

import openai

MODEL = os.environ["MODEL"]
client = openai.OpenAI(max_retries=0)
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather of a city.",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "enum": ["Rome", "Paris"]},
                    "days": {"type": "integer", "minimum": 1, "maximum": 9},
                },
                "required": ["city", "days"],
                "additionalProperties": False,
            },
            "strict": True,
        },
    },
    {
        "type": "function",
        "function": {
            "name": "get_time",
            "description": "What time it is.",
            "parameters": {"type": "object", "properties": {}},
        },
    },
]
NAMED = {"type": "function", "function": {"name": "get_weather"}}
options = {"model": MODEL, "temperature": 0, "max_tokens": 200, "tools": TOOLS, "parallel_tool_calls": False}


def ask(messages, streamed, **more):
    """The completion, however it is told."""
    if not streamed:
        return client.chat.completions.create(messages=messages, **options, **more)
    with client.chat.completions.stream(
        messages=messages, stream_options={"include_usage": True}, **options, **more
    ) as stream:
        arguments = [event.arguments_delta for event in stream if event.type == "tool_calls.function.arguments.delta"]
        completion = stream.get_final_completion()
    calls = completion.choices[0].message.tool_calls or []
    assert "".join(arguments) == "".join(call.function.arguments for call in calls)
    return completion


for streamed in (False, True):
    # The first two steps have to call something; then the model may answer.
    messages = [{"role": "user", "content": f"How is the weather in Rome? ({streamed})"}]
    num_known = 0
    for choice in (NAMED, "required", "none"):
        # The helper for streams takes an answer that max_tokens ends for a failure, and a text may be as long.
        completion = ask(messages, streamed and choice != "none", tool_choice=choice)
        (told,) = completion.choices
        cached = completion.usage.prompt_tokens_details.cached_tokens
        assert cached >= num_known - 1, f"{cached} tokens were cached, of {num_known} that were there"
        num_known = completion.usage.prompt_tokens + completion.usage.completion_tokens - 1
        messages.append(told.message)
        if choice == "none":
            assert told.finish_reason in ("stop", "length") and not told.message.tool_calls, told
            break
        assert told.finish_reason == "tool_calls", told
        for call in told.message.tool_calls:
            arguments = json.loads(call.function.arguments)
            if call.function.name == "get_weather":
                assert set(arguments) == {"city", "days"} and arguments["city"] in ("Rome", "Paris"), arguments
            else:
                assert choice == "required" and call.function.name == "get_time", call
            messages.append(
                {
                    "role": "tool",
                    "tool_call_id": call.id,
                    "content": json.dumps({"weather": "sunny", "asked": arguments}),
                }
            )
    assert any(getattr(message, "tool_calls", None) for message in messages)
print("openai", openai.__version__, completion.usage)
