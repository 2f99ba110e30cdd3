"""The `openai` package: answers and calls parsed into pydantic models, whole and streamed."""

import json
import os
from typing import Literal

import openai
from pydantic import BaseModel, Field

MODEL = os.environ["MODEL"]
client = openai.OpenAI(max_retries=0)


class Person(BaseModel, extra="forbid"):
    name: Literal["Ada", "Alan"]
    age: int = Field(ge=1, le=99)
    likes: list[Literal["tea", "chess"]] = Field(min_length=1, max_length=2)


class Greet(BaseModel):
    """A greeting, and the name in it."""

    person: Person


ASK = [{"role": "user", "content": "Who invented the computer?"}]
options = {"model": MODEL, "temperature": 0, "max_tokens": 300, "messages": ASK}

parsed = client.chat.completions.parse(response_format=Person, **options).choices[0].message
assert isinstance(parsed.parsed, Person) and Person.model_validate_json(parsed.content) == parsed.parsed

with client.chat.completions.stream(response_format=Person, **options) as stream:
    partial = [event.parsed for event in stream if event.type == "content.delta"]
    assert partial and stream.get_final_completion().choices[0].message.parsed == parsed.parsed

schema = {
    "type": "json_schema",
    "json_schema": {"name": "person", "schema": Person.model_json_schema(), "strict": True},
}
told = client.chat.completions.create(response_format=schema, **options).choices[0].message.content
assert Person.model_validate_json(told) == parsed.parsed
told = client.chat.completions.create(response_format={"type": "json_object"}, **options)
if told.choices[0].finish_reason == "stop":  # how long any object gets, a small model does not know
    assert isinstance(json.loads(told.choices[0].message.content), dict), told

tool = openai.pydantic_function_tool(Greet)
called = client.chat.completions.parse(tools=[tool], tool_choice="required", parallel_tool_calls=False, **options)
(call,) = called.choices[0].message.tool_calls
assert call.function.name == "Greet" and isinstance(call.function.parsed_arguments, Greet), call
print("openai", openai.__version__, parsed.parsed, call.function.parsed_arguments)
