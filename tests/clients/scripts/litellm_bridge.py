"""The `litellm` package: calls and forms under its names of providers, and its bridges to other APIs."""

import asyncio
import json
import os
from importlib.metadata import version

import litellm

MODEL = os.environ["MODEL"]
BASE = os.environ["OPENAI_BASE_URL"]
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "enum": ["Rome", "Paris"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
ASK = [{"role": "user", "content": "How is the weather in Rome?"}]
litellm.telemetry = False

for provider in ("openai", "hosted_vllm"):
    options = {"model": f"{provider}/{MODEL}", "api_base": BASE, "temperature": 0, "max_tokens": 200, "num_retries": 0}
    tools = {"tools": [TOOL], "parallel_tool_calls": False}
    first = litellm.completion(messages=ASK, tool_choice="required", **tools, **options)
    (call,) = first.choices[0].message.tool_calls
    assert json.loads(call.function.arguments)["city"] in ("Rome", "Paris"), call
    pieces = list(litellm.completion(messages=ASK, tool_choice="required", stream=True, **tools, **options))
    whole = litellm.stream_chunk_builder(pieces, messages=ASK)
    assert whole.choices[0].message.tool_calls[0].function.arguments == call.function.arguments, whole
    result = {"role": "tool", "tool_call_id": call.id, "content": "sunny"}
    second = litellm.completion(
        messages=[*ASK, first.choices[0].message, result], tool_choice="none", **tools, **options
    )
    assert second.choices[0].message.content and not second.choices[0].message.tool_calls, second
    known = first.usage.prompt_tokens + first.usage.completion_tokens - 1
    assert second.usage.prompt_tokens_details.cached_tokens >= known - 1, (first.usage, second.usage)

    schema = TOOL["function"]["parameters"]
    form = {"type": "json_schema", "json_schema": {"name": "place", "schema": schema, "strict": True}}
    told = litellm.completion(messages=ASK, response_format=form, **options).choices[0].message.content
    assert json.loads(told)["city"] in ("Rome", "Paris"), told
    effort = litellm.completion(
        messages=ASK, reasoning_effort="low", allowed_openai_params=["reasoning_effort"], **options
    )
    assert effort.choices[0].message.content, effort

options = {"model": f"openai/{MODEL}", "api_base": BASE}
told = litellm.responses(input="Hello!", max_output_tokens=16, **options)
assert told.status in ("completed", "incomplete") and told.output, told
text = litellm.text_completion(model=f"text-completion-openai/{MODEL}", api_base=BASE, prompt="Once upon", max_tokens=8)
assert text.choices[0].text, text


async def bridge():
    """Anthropic's API in front of ours, as a proxy for coding agents has it."""
    tool = {"name": "get_weather", "description": "The weather.", "input_schema": TOOL["function"]["parameters"]}
    return await litellm.anthropic.messages.acreate(
        messages=ASK, tools=[tool], tool_choice={"type": "any"}, max_tokens=200, **options
    )


message = asyncio.run(bridge())
blocks = [block for block in message["content"] if block["type"] == "tool_use"]
assert blocks and blocks[0]["input"]["city"] in ("Rome", "Paris"), message
print("litellm", version("litellm"), second.usage)
