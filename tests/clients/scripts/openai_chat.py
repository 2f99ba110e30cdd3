"""The `openai` package: chat and text completions, streams and their helper, usage, errors."""

import os
from contextlib import suppress

import openai

MODEL = os.environ["MODEL"]
HELLO = [{"role": "user", "content": "Hello!"}]
client = openai.OpenAI(max_retries=0)

(served,) = client.models.list().data
assert served.id == MODEL
assert client.models.retrieve(MODEL).id == MODEL

options = {"model": MODEL, "temperature": 0, "max_tokens": 16}
whole = client.chat.completions.create(messages=HELLO, **options)
answer = whole.choices[0].message
assert answer.role == "assistant" and answer.content, whole
assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens

# The same in pieces, and then by the helper that puts them together.
pieces = list(
    client.chat.completions.create(messages=HELLO, stream=True, stream_options={"include_usage": True}, **options)
)
assert "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices) == answer.content
assert pieces[-1].usage.completion_tokens == whole.usage.completion_tokens
told = ""
# The helper takes an answer that max_tokens ends for a failure.
with suppress(openai.LengthFinishReasonError), client.chat.completions.stream(messages=HELLO, **options) as stream:
    for event in stream:
        told += event.delta if event.type == "content.delta" else ""
assert told == answer.content

# The answer goes back as the object that it came in: what is known of the conversation is not computed again.
second = client.chat.completions.create(messages=[*HELLO, answer, {"role": "user", "content": "And then?"}], **options)
known = whole.usage.prompt_tokens + whole.usage.completion_tokens - 1
assert second.usage.prompt_tokens_details.cached_tokens >= known - 1, (second.usage, whole.usage)

text = client.completions.create(prompt="Once upon a time", logprobs=1, **options)
assert text.choices[0].text and len(text.choices[0].logprobs.tokens) == text.usage.completion_tokens
told = "".join(
    piece.choices[0].text for piece in client.completions.create(prompt="Once upon a time", stream=True, **options)
)
assert told == text.choices[0].text

try:
    client.chat.completions.create(messages=HELLO, model=MODEL, temperature=-1)
except openai.BadRequestError as error:
    assert error.param == "temperature", error
else:
    raise AssertionError("a temperature below 0 was accepted")
try:
    client.chat.completions.create(messages=HELLO, model="another")
except openai.NotFoundError as error:
    assert error.code == "model_not_found", error
else:
    raise AssertionError("an unknown model was accepted")
print("openai", openai.__version__, second.usage)
