"""The `instructor` package: a pydantic model out of a chat, in its modes, whole and in parts."""

import os
from contextlib import suppress
from importlib.metadata import version
from typing import Literal

import instructor
import openai
from instructor.core.exceptions import IncompleteOutputException
from pydantic import BaseModel, Field

MODEL = os.environ["MODEL"]


class Person(BaseModel):
    name: Literal["Ada", "Alan"]
    age: int = Field(ge=1, le=99)


options = {
    "model": MODEL,
    "temperature": 0,
    "max_tokens": 300,
    "messages": [{"role": "user", "content": "Ada is 30 years old."}],
    "max_retries": 0,
}
for mode in (instructor.Mode.TOOLS, instructor.Mode.TOOLS_STRICT, instructor.Mode.JSON_SCHEMA):
    client = instructor.from_openai(openai.OpenAI(max_retries=0), mode=mode)
    person = client.chat.completions.create(response_model=Person, **options)
    assert isinstance(person, Person), (mode, person)
    parts = list(client.chat.completions.create_partial(response_model=Person, **options))
    assert len(parts) > 1 and Person.model_validate(parts[-1].model_dump()), (mode, parts)


# In the plain JSON mode only JSON is sure, not that it is a person.
class Anything(BaseModel, extra="allow"):
    pass


client = instructor.from_openai(openai.OpenAI(max_retries=0), mode=instructor.Mode.JSON)
with suppress(IncompleteOutputException):  # a small model may not end its object: the mode is answered, which counts
    assert isinstance(client.chat.completions.create(response_model=Anything, **options), Anything)
print("instructor", version("instructor"), person)
