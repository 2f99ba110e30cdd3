"""The wording of answers where it is more than copying: log-probabilities, lagging text, offsets."""

from deployments.completions.answers import ChatFormat, CompletionFormat
from deployments.completions.requests import ChatCompletionBody, CompletionBody
from deployments.generation import ErrorItem
from deployments.http.errors import MAX_MESSAGE_CHARS, error_body
from engine.errors import RequestError
from engine.text.output import OutputDelta, TokenLogprob


def token(token_id: int, token_bytes: bytes, logprob: float, text_offset: int = 0, top=()) -> TokenLogprob:
    text = token_bytes.decode(errors="backslashreplace")
    return TokenLogprob(token_id, text, token_bytes, logprob, text_offset, tuple(top))


LOGPROBS = (
    token(1, "é".encode(), -0.5, 0, [token(1, "é".encode(), -0.5), token(2, b"b", -1.5)]),
    token(3, b"cd", -0.25, 1),
)
END = TokenLogprob(9, "<|end|>", None, -0.125)
# " 🎉" in three tokens, the first of which is a space and a part of a character.
PARTS = (token(4, b" \xf0\x9f", -0.5, 0), token(5, b"\x8e", -0.25, 1), token(6, b"\x89", -0.125, 1))


def chat_format(**options: object) -> ChatFormat:
    messages = [{"role": "user", "content": "hi"}]
    return ChatFormat("id", 1, ChatCompletionBody.model_validate({"model": "m", "messages": messages} | options))


def completion_format(**options: object) -> CompletionFormat:
    return CompletionFormat("id", 1, CompletionBody.model_validate({"model": "m", "prompt": "hi"} | options))


def test_chat_logprobs() -> None:
    answer = chat_format().whole(OutputDelta("écd", (1, 3), LOGPROBS, finish_reason="stop"))
    first, second = answer["choices"][0]["logprobs"]["content"]
    assert first["token"] == "é"
    assert first["bytes"] == [0xC3, 0xA9]
    assert [top["token"] for top in first["top_logprobs"]] == ["é", "b"]
    assert second == {"token": "cd", "logprob": -0.25, "bytes": [99, 100], "top_logprobs": []}


def test_chat_bytes_can_be_joined_to_the_text() -> None:
    """Each part of a character has its own bytes, and a name that tells them apart, as OpenAI's have."""
    content = chat_format().whole(OutputDelta(" 🎉", (4, 5, 6), PARTS))["choices"][0]["logprobs"]["content"]
    assert [entry["token"] for entry in content] == [r" \xf0\x9f", r"\x8e", r"\x89"]
    assert bytes(byte for entry in content for byte in entry["bytes"]).decode() == " 🎉"


def test_special_tokens_have_a_name_and_no_bytes() -> None:
    """The token that ends an answer is reported, but is no part of its text."""
    last = TokenLogprob(9, "<|end|>", None, -0.125, 2, (END,))
    (entry,) = chat_format().whole(OutputDelta("", (9,), (last,)))["choices"][0]["logprobs"]["content"]
    assert (entry["token"], entry["bytes"], entry["top_logprobs"][0]["bytes"]) == ("<|end|>", None, None)
    logprobs = completion_format().whole(OutputDelta("", (9,), (last,)))["choices"][0]["logprobs"]
    assert (logprobs["tokens"], logprobs["text_offset"]) == (["<|end|>"], [2])


def test_completion_logprobs_tell_parts_of_characters_apart() -> None:
    """As OpenAI's: this API has no bytes besides the token."""
    first = token(4, b" \xf0\x9f", -3.0, 0, [token(7, b"\xf0", -0.5), token(8, b"\xf1", -0.75), token(3, b"cd", -1.0)])
    logprobs = completion_format().whole(OutputDelta("", (4,), (first,)))["choices"][0]["logprobs"]
    assert logprobs["tokens"] == [r"bytes: \xf0\x9f"]
    (top,) = logprobs["top_logprobs"]
    assert top == {r"bytes: \xf0\x9f": -3.0, r"bytes:\xf0": -0.5, r"bytes:\xf1": -0.75, "cd": -1.0}


def test_the_sampled_token_is_among_the_top_logprobs_of_completions() -> None:
    """So there are up to one more than were asked for; with `logprobs: 0` it is alone."""
    top = [token(1, b"a", -0.5), token(2, b"b", -1.0)]
    sampled = (token(3, b"c", -2.0, 0, top), token(2, b"b", -1.0, 1, top), token(4, b"d", -4.0, 2))
    logprobs = completion_format().whole(OutputDelta("cbd", (3, 2, 4), sampled))["choices"][0]["logprobs"]
    assert logprobs["top_logprobs"] == [{"c": -2.0, "a": -0.5, "b": -1.0}, {"b": -1.0, "a": -0.5}, {"d": -4.0}]
    for name, value, others in zip(
        logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True
    ):
        assert others[name] == value


def test_two_tokens_of_one_text_are_two_entries() -> None:
    """A and the byte 41, say; ids beyond the vocabulary have no text at all."""
    top = [token(1, b"A", -0.5), token(2, b"A", -1.0), token(8, b"", -1.5), token(9, b"", -2.0)]
    logprobs = completion_format().whole(OutputDelta("A", (2,), (token(2, b"A", -1.0, 0, top),)))
    (values,) = logprobs["choices"][0]["logprobs"]["top_logprobs"]
    assert values == {"A": -1.0, "token_id:1": -0.5, "": -1.5, "token_id:9": -2.0}


def test_completion_logprobs_have_the_offsets_that_the_engine_counted() -> None:
    answer_format = completion_format()
    logprobs = answer_format.chunks(OutputDelta("écd", (1, 3), LOGPROBS))[0]["choices"][0]["logprobs"]
    assert logprobs["text_offset"] == [0, 1]
    (chunk,) = answer_format.chunks(OutputDelta(" 🎉", (4, 5, 6), PARTS))
    assert chunk["choices"][0]["logprobs"]["text_offset"] == [0, 1, 1]


def test_no_chunk_for_a_delta_without_text() -> None:
    lagging = OutputDelta("", (1,))
    answer_format = chat_format()
    assert [c["choices"][0]["delta"].get("role") for c in answer_format.chunks(lagging)] == ["assistant"]
    assert answer_format.chunks(lagging) == []
    assert completion_format().chunks(lagging) == []


def test_token_ids_come_with_every_delta_and_those_of_the_prompt_once() -> None:
    first, later = OutputDelta("", (1,), prompt_token_ids=(7, 8)), OutputDelta("", (2,))
    chat = chat_format(return_token_ids=True)
    role, content = chat.chunks(first)
    assert role["prompt_token_ids"] == [7, 8]
    assert content["choices"][0]["token_ids"] == [1]
    (content,) = chat.chunks(later)
    assert content["choices"][0]["token_ids"] == [2]
    completion = completion_format(return_token_ids=True)
    assert completion.chunks(first)[0]["choices"][0]["prompt_token_ids"] == [7, 8]
    assert "prompt_token_ids" not in completion.chunks(later)[0]["choices"][0]


def test_usage_in_every_chunk_when_asked_for() -> None:
    options = {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}
    (chunk,) = completion_format(**options).chunks(OutputDelta("a", (1,), num_prompt_tokens=4, num_output_tokens=1))
    assert chunk["usage"]["total_tokens"] == 5


def test_errors_are_cut_to_size() -> None:
    body = error_body(ErrorItem.of(RequestError("x" * 10_000)))
    assert len(body["error"]["message"]) == MAX_MESSAGE_CHARS


def test_the_stop_string_that_ended_an_answer_is_told_as_in_vllm() -> None:
    stopped, ended = (OutputDelta("x", finish_reason="stop", stop_string=string) for string in ("END", None))
    for make in (chat_format, completion_format):
        assert make().whole(stopped)["choices"][0]["stop_reason"] == "END"
        assert make().chunks(stopped)[-1]["choices"][0]["stop_reason"] == "END"
        assert "stop_reason" not in make().whole(ended)["choices"][0]


def test_usage_tells_guesses_that_were_verified_of_all_choices() -> None:
    deltas = [OutputDelta("x", num_guessed_tokens=5, num_accepted_tokens=num) for num in (3, 1)]
    details = chat_format(n=2).whole(*deltas)["usage"]["completion_tokens_details"]
    assert details == {"accepted_prediction_tokens": 4, "rejected_prediction_tokens": 6}
