"""The wording of answers where it is more than copying: log-probabilities, lagging text, offsets."""

from deployments.generation import ErrorItem
from deployments.openai_responses import MAX_MESSAGE_CHARS, ChatFormat, CompletionFormat, error_body
from deployments.openai_types import ChatCompletionBody, CompletionBody
from engine.output import OutputDelta, TokenLogprob

LOGPROBS = (TokenLogprob(1, "é", -0.5, ((1, "é", -0.5), (2, "b", -1.5))), TokenLogprob(3, "cd", -0.25))


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


def test_completion_logprobs_count_characters_over_chunks() -> None:
    answer_format = completion_format()
    offsets = [
        answer_format.chunks(OutputDelta("écd", (1, 3), LOGPROBS))[0]["choices"][0]["logprobs"]["text_offset"]
        for _ in range(2)
    ]
    assert offsets == [[0, 1], [3, 4]]


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
    body = error_body(ErrorItem(400, "x" * 10_000, "invalid_request_error"))
    assert len(body["error"]["message"]) == MAX_MESSAGE_CHARS
