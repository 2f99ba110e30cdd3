"""What a request may say: every refusal names its parameter, every neutral value of a parameter passes."""

import json
import tracemalloc
from typing import Any

import pytest

from deployments.completions.chat_messages import MESSAGE_NOT_IMPLEMENTED
from deployments.completions.choices_body import CHOICES_IGNORED, CHOICES_NOT_IMPLEMENTED, MAX_N
from deployments.completions.requests import (
    CHAT_NOT_IMPLEMENTED,
    ChatCompletionBody,
    CompletionBody,
)
from deployments.http.errors import wire_of
from deployments.http.generation_body import MAX_MESSAGES
from deployments.http.parsing import MAX_FIELDS, MAX_PARTS, parse_request
from engine.core.request import MAX_LOGIT_BIAS, MAX_STOP_TOKEN_IDS, SamplingParams
from engine.dialogue import messages as dialogue
from engine.errors import RequestError
from engine.text.prompt import ChatPrompt, TextPrompt, TokenPrompt
from tests.deployments.refusals import refusal
from tests.deployments.sampling import SAMPLING

CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
COMPLETION: dict[str, Any] = {"model": "m", "prompt": "hi"}


BEST_OF = ("best_of", "invalid_value")


def parse_chat(**changes: Any) -> ChatCompletionBody:
    return parse_request(ChatCompletionBody, json.dumps(CHAT | changes).encode())[0]


def parse_completion(**changes: Any) -> CompletionBody:
    return parse_request(CompletionBody, json.dumps(COMPLETION | changes).encode())[0]


def refused(parse: Any, **changes: Any) -> tuple[str | None, str | None]:
    """The parameter and the code with which a body with these changes is refused."""
    return refusal(lambda: parse(**changes).sampling_params())


def test_plain_chat() -> None:
    body = parse_chat()
    assert body.prompt_value() == ChatPrompt((("user", "hi"),))
    assert body.sampling_params() == SamplingParams(temperature=1.0)
    assert not body.stream


def test_everything_implemented_reaches_the_sampling_parameters() -> None:
    bias = ((7, -100.0), (0, 2.5))
    expected = SamplingParams(
        max_tokens=9, stop=("a", "b"), stop_token_ids=(4,), logprobs=3, logit_bias=bias, **SAMPLING
    )
    common = SAMPLING | {"stop": ["a", "b"], "stop_token_ids": [4], "logit_bias": {"7": -100, "0": 2.5}}
    chat = parse_chat(max_completion_tokens=9, logprobs=True, top_logprobs=3, **common)
    assert chat.sampling_params() == expected
    assert parse_completion(max_tokens=9, logprobs=3, **common).sampling_params() == expected


def test_defaults_and_aliases() -> None:
    assert parse_completion().sampling_params().max_tokens == 16  # OpenAI's
    assert parse_chat(max_tokens=4, max_completion_tokens=4).sampling_params().max_tokens == 4
    assert parse_chat(logprobs=True).sampling_params().logprobs == 0
    assert parse_chat(stop="x").sampling_params().stop == ("x",)
    assert parse_chat(top_k=-1).sampling_params().top_k == 0  # how vLLM's clients switch it off
    assert parse_chat(temperature=None, stream=None, stop=None, seed=None) == parse_chat()


def test_best_of_has_to_mean_n() -> None:
    assert parse_completion(n=3, best_of=3).num_choices == parse_completion(n=3).num_choices == 3
    assert refused(parse_completion, n=2, best_of=3) == refused(parse_completion, best_of=3) == BEST_OF
    assert parse_completion(prompt=["a", "b"], n=3).num_choices == 6


def test_content_parts_and_roles() -> None:
    parts = [
        {"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}},
        {"type": "input_text", "text": "b"},
        {"type": "output_text", "text": "c", "annotations": [], "logprobs": []},
    ]
    messages = [{"role": "developer", "content": "s"}, {"role": "user", "content": parts}]
    said = dialogue.Message("user", "abc", cache_marks=(dialogue.CacheMark(end=1, ttl_s=300.0),))
    assert parse_chat(messages=messages).prompt_value() == ChatPrompt((("system", "s"), said))


def test_assistant_message_is_taken_back_as_the_client_library_dumps_it() -> None:
    message = {"role": "assistant", "content": "yes", "tool_calls": [], "annotations": [{"type": "x"}], "refusal": None}
    message |= dict.fromkeys(MESSAGE_NOT_IMPLEMENTED)
    assert parse_chat(messages=[message]).prompt_value() == ChatPrompt((("assistant", "yes"),))


@pytest.mark.parametrize(
    "said", [{"content": None, "refusal": "no"}, {"content": [{"type": "refusal", "refusal": "no", "text": None}]}]
)
def test_a_refusal_is_what_the_assistant_said(said: dict[str, Any]) -> None:
    assert parse_chat(messages=[{"role": "assistant"} | said]).prompt_value() == ChatPrompt((("assistant", "no"),))
    assert refused(parse_chat, messages=[{"role": "user", "content": "x", "refusal": "no"}])[0] == "messages[0].refusal"


def test_no_limit_of_tokens_is_minus_one() -> None:
    for name in ("max_tokens", "max_completion_tokens"):
        assert parse_chat(**{name: -1}) == parse_chat()
    assert parse_completion(max_tokens=-1).sampling_params().max_tokens is None
    assert parse_completion(max_tokens=0, echo=True).sampling_params().max_tokens == 1
    assert parse_chat(max_tokens=-1.0) == parse_chat()


@pytest.mark.parametrize(
    ("prompt", "value"),
    [
        ("hi", (TextPrompt("hi"),)),
        (["hi"], (TextPrompt("hi"),)),
        (["a", "b"], (TextPrompt("a"), TextPrompt("b"))),
        ([1, 2], (TokenPrompt((1, 2)),)),
        ([[1, 2]], (TokenPrompt((1, 2)),)),
        ([[1], [2]], (TokenPrompt((1,)), TokenPrompt((2,)))),
    ],
)
def test_prompts(prompt: Any, value: Any) -> None:
    assert parse_completion(prompt=prompt).prompts == value


@pytest.mark.parametrize(
    "prompt", ["", [], [[]], [""], ["a", ""], ["a", [1]], [1, "a"], [-1], [True], [[1], [-1]], ["a"] * 129, 5, {}]
)
def test_bad_prompts(prompt: Any) -> None:
    assert refused(parse_completion, prompt=prompt)[0] == "prompt"


@pytest.mark.parametrize("name", CHAT_NOT_IMPLEMENTED)
def test_what_chat_does_not_implement_is_refused_by_name(name: str) -> None:
    assert refused(parse_chat, **{name: ["something"]}) == (name, "unsupported_parameter")
    for neutral in (None, *CHAT_NOT_IMPLEMENTED[name]):
        assert parse_chat(**{name: neutral}) == parse_chat()


@pytest.mark.parametrize("name", CHOICES_NOT_IMPLEMENTED)
def test_what_completions_do_not_implement_is_refused_by_name(name: str) -> None:
    assert refused(parse_completion, **{name: ["something"]}) == (
        name,
        "unsupported_parameter",
    )
    for neutral in (None, *CHOICES_NOT_IMPLEMENTED[name]):
        assert parse_completion(**{name: neutral}) == parse_completion()


@pytest.mark.parametrize("name", sorted(CHOICES_IGNORED))
def test_ignored_parameters_change_nothing(name: str) -> None:
    assert parse_chat(**{name: "x"}) == parse_chat()


@pytest.mark.parametrize(
    ("changes", "param", "code"),
    [
        ({"model": None}, "model", "missing_required_parameter"),
        ({"model": 5}, "model", "invalid_value"),
        ({"messages": None}, "messages", "missing_required_parameter"),
        ({"messages": []}, "messages", "invalid_value"),
        ({"messages": "hi"}, "messages", "invalid_value"),
        ({"messages": ["hi"]}, "messages[0]", "invalid_value"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "missing_required_parameter"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id", "missing_required_parameter"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "invalid_value"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
            "messages[0].content[0].text",
            "missing_required_parameter",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "x", "mood": 1}]}]},
            "messages[0].content[0].mood",
            "unknown_parameter",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages[0].content[0].type",
            "unsupported_parameter",
        ),
        (
            {"messages": [{"role": "assistant", "content": "x", "tool_calls": [{}]}]},
            "messages[0].tool_calls[0].id",
            "missing_required_parameter",
        ),
        ({"messages": [{"role": "user", "content": "x", "mood": 1}]}, "messages[0].mood", "unknown_parameter"),
        ({"n": 0}, "n", "invalid_value"),
        ({"n": MAX_N + 1}, "n", "invalid_value"),
        ({"n": True}, "n", "invalid_value"),
        ({"logit_bias": []}, "logit_bias", "invalid_value"),
        ({"logit_bias": {"5": "much"}}, "logit_bias.5", "invalid_value"),
        ({"logit_bias": {"5": 101}}, "logit_bias.5", "invalid_value"),
        ({"logit_bias": {"-5": 1}}, "logit_bias", "invalid_value"),
        ({"logit_bias": {"05": 1}}, "logit_bias", "invalid_value"),
        ({"logit_bias": {"five": 1}}, "logit_bias", "invalid_value"),
        ({"logit_bias": {"9" * 11: 1}}, "logit_bias", "invalid_value"),
        ({"logit_bias": dict.fromkeys(map(str, range(MAX_LOGIT_BIAS + 1)), 1)}, "logit_bias", "invalid_value"),
        ({"frobnicate": 1}, "frobnicate", "unknown_parameter"),
        ({"temperature": "hot"}, "temperature", "invalid_value"),
        ({"temperature": -1}, "temperature", "invalid_value"),
        ({"temperature": 1e9}, "temperature", "invalid_value"),
        ({"top_p": 0}, "top_p", "invalid_value"),
        ({"top_p": 1.5}, "top_p", "invalid_value"),
        ({"top_k": -7}, "top_k", "invalid_value"),
        ({"min_p": 2}, "min_p", "invalid_value"),
        ({"repetition_penalty": 0}, "repetition_penalty", "invalid_value"),
        ({"presence_penalty": 3}, "presence_penalty", "invalid_value"),
        ({"frequency_penalty": -3}, "frequency_penalty", "invalid_value"),
        ({"max_tokens": 0}, "max_tokens", "invalid_value"),
        ({"max_tokens": -5}, "max_tokens", "invalid_value"),
        ({"max_tokens": 1.5}, "max_tokens", "invalid_value"),
        ({"max_tokens": True}, "max_tokens", "invalid_value"),
        ({"max_completion_tokens": 0}, "max_completion_tokens", "invalid_value"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens", "invalid_value"),
        ({"max_tokens": 1, "min_tokens": 2}, "min_tokens", "invalid_value"),
        ({"seed": 2**64}, "seed", "invalid_value"),
        ({"stop": 5}, "stop", "invalid_value"),
        ({"stop": [""]}, "stop", "invalid_value"),
        ({"stop": ["x"] * 17}, "stop", "invalid_value"),
        ({"stop": ["x" * 257]}, "stop", "invalid_value"),
        ({"stop": ["x" * 30_000] * 16}, "stop", "invalid_value"),
        ({"stop_token_ids": [1] * 129}, "stop_token_ids", "invalid_value"),
        ({"stop_token_ids": [-1]}, "stop_token_ids[0]", "invalid_value"),
        ({"top_logprobs": 2}, "top_logprobs", "invalid_value"),
        ({"logprobs": True, "top_logprobs": 99}, "top_logprobs", "invalid_value"),
        ({"logprobs": 2}, "logprobs", "invalid_value"),
        ({"stream": "yes"}, "stream", "invalid_value"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "invalid_value"),
        ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x", "unknown_parameter"),
        ({"session_id": "s" * 1000}, "session_id", "invalid_value"),
        ({"conversation": 5}, "conversation", "invalid_value"),
    ],
)
def test_refusals_of_chat(changes: dict[str, Any], param: str, code: str) -> None:
    assert refused(parse_chat, **changes) == (param, code)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"[]",
        b'"text"',
        b"\xff\xfe",
        b'{"model": "m",}',
        b'{"model": "m", "prompt": "hi", "temperature": NaN}',
        b'{"model": "m", "prompt": "hi", "temperature": 1e999}',
        b'{"model": "m", "prompt": "hi", "seed": ' + b"9" * 9999 + b"}",
        b'{"model": "m", "prompt": "\\ud800"}',
        b"[" * 100_000,
        '{"model": "m", "prompt": "é"}'.encode("latin-1"),
    ],
)
def test_bodies_that_are_no_request(raw: bytes) -> None:
    with pytest.raises(RequestError) as info:
        parse_request(CompletionBody, raw)
    assert wire_of(info.value).status == 400


def test_a_refusal_does_not_repeat_megabytes() -> None:
    with pytest.raises(RequestError) as info:
        parse_chat(**{"x" * 1_000_000: 1})
    assert len(info.value.message) < 200


# -- sizes -------------------------------------------------------------------------------------------------------------

MESSAGE = {"role": "user", "content": ""}
MANY = {str(number): 1 for number in range(300_000)}
HOSTILE: dict[str, dict[str, Any]] = {
    # 130,000 of the first kind once took 28 bytes of memory for each of the body.
    "messages": {"messages": [MESSAGE] * 130_000},
    "fewer messages": {"messages": [MESSAGE] * 33_000},
    "messages that are none": {"messages": [1] * 1_000_000},
    "parts": {"messages": [MESSAGE | {"content": [{"type": "text", "text": ""}] * 130_000}]},
    "fields": MANY,
    "fields of a message": {"messages": [MESSAGE | MANY]},
    "fields of messages": {"messages": [MESSAGE | dict.fromkeys(map(str, range(100)), 1)] * 900},
    "lists": {"x": [[]] * 1_000_000},
    "objects": {"x": [{}] * 1_000_000},
    "stop": {"stop": [1] * 1_000_000},
    "stop_token_ids": {"stop_token_ids": [-1] * 1_000_000},
    "logit_bias": {"logit_bias": MANY},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_the_size_of_a_body_bounds_what_is_made_of_it(name: str) -> None:
    """Twelve bytes for each one of the body are what the JSON parser may take for the largest that it is given."""
    raw = json.dumps(CHAT | HOSTILE[name]).encode()
    tracemalloc.start()
    try:
        with pytest.raises(RequestError) as caught:
            parse_request(ChatCompletionBody, raw)
        most_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert wire_of(caught.value).status == 400
    assert len(caught.value.message) < 200
    assert most_bytes < 12 * len(raw)


def test_marks_in_a_text_are_text() -> None:
    """Whatever a message quotes: a file of JSON, or something that only looks like the end of the text."""
    for quoted in (
        json.dumps([MESSAGE] * 50_000),
        "{[:" * MAX_PARTS,
        '\\"{' * MAX_PARTS,
        '\\\\"[\\' * MAX_PARTS,
        '"' * MAX_PARTS,
    ):
        (message,) = parse_chat(messages=[MESSAGE | {"content": quoted}]).messages
        assert message.content == quoted


def test_as_many_as_may_be() -> None:
    assert len(parse_chat(messages=[MESSAGE] * MAX_MESSAGES).messages) == MAX_MESSAGES
    assert refused(parse_chat, messages=[MESSAGE] * (MAX_MESSAGES + 1)) == (
        "messages",
        "invalid_value",
    )
    assert len(parse_chat(stop_token_ids=[1] * MAX_STOP_TOKEN_IDS).stop_token_ids) == MAX_STOP_TOKEN_IDS
    assert refused(parse_chat, stop_token_ids=[1] * (MAX_STOP_TOKEN_IDS + 1)) == (
        "stop_token_ids",
        "invalid_value",
    )
    fields = dict.fromkeys(map(str, range(MAX_FIELDS)), 1)
    assert refused(parse_chat, **fields) == (None, "invalid_value")
    assert refused(parse_chat, messages=[MESSAGE | fields]) == (
        "messages[0]",
        "invalid_value",
    )


def test_text_of_any_length_and_long_prompts_of_ids_pass() -> None:
    assert len(parse_completion(prompt="x" * 3_000_000).prompt[0]) == 3_000_000
    assert len(parse_completion(prompt=[300] * 500_000).prompt[0]) == 500_000


# -- thinking ----------------------------------------------------------------------------------------------------------


def test_values_for_the_chat_template() -> None:
    def values(**changes: Any) -> Any:
        return parse_chat(**changes).prompt_value().template_kwargs

    assert values() == {}
    assert values(reasoning_effort="none") == {"reasoning_effort": "none", "enable_thinking": False, "thinking": False}
    assert values(reasoning_effort="high", chat_template_kwargs={"enable_thinking": False, "x": [1]}) == {
        "reasoning_effort": "high",
        "enable_thinking": False,
        "thinking": True,
        "x": [1],
    }
    assert values(chat_template_kwargs=None, reasoning_effort=None) == {}


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"reasoning_effort": "huge"}, "reasoning_effort"),
        ({"chat_template_kwargs": []}, "chat_template_kwargs"),
        ({"chat_template_kwargs": dict.fromkeys(map("x{}".format, range(33)))}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs.messages"),
        ({"chat_template_kwargs": {"no name": 1}}, "chat_template_kwargs.no name"),
    ],
)
def test_refused_values_for_the_chat_template(changes: dict[str, Any], param: str) -> None:
    assert refusal(lambda: parse_chat(**changes).prompt_value()) == (param, "invalid_value")
