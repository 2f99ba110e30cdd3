"""The `openai` package: a model that calls tools by itself, through turns whose steps it chooses."""

import json
import os

import openai

MODEL = os.environ["MODEL"]
client = openai.OpenAI(max_retries=0)
WEATHER = {"Paris": "sunny", "Rome": "windy"}
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
if "tools" not in MODEL:
    raise SystemExit(0)  # this one is for the model embedded-tools: no other small one calls by itself
messages = []
num_known = 0
for city, weather in WEATHER.items():
    messages.append({"role": "user", "content": f"What is the weather in {city}?"})
    for step in ("call", "answer"):
        told = client.chat.completions.create(
            model=MODEL, messages=messages, tools=[TOOL], temperature=0, max_tokens=60
        )
        cached = told.usage.prompt_tokens_details.cached_tokens
        assert cached >= num_known - 1, f"{cached} tokens were cached, of {num_known} that were there"
        num_known = told.usage.prompt_tokens + told.usage.completion_tokens - 1
        (choice,) = told.choices
        messages.append(choice.message)
        if step == "answer":
            assert choice.finish_reason == "stop", choice
            assert weather in choice.message.content, choice
        else:
            assert choice.finish_reason == "tool_calls", choice
            (call,) = choice.message.tool_calls
            assert json.loads(call.function.arguments) == {"city": city}, call
            messages.append({"role": "tool", "tool_call_id": call.id, "content": weather})
print("openai", openai.__version__, told.usage)
