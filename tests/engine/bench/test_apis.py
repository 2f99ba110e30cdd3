"""What is sent for a turn in each API, and what is made of the answer."""

from __future__ import annotations

import pytest

from engine.bench.apis import Content, Heard, counts_of, make_conversation
from engine.dialogue.messages import Message
from engine.workloads.session import Session, Span, Turn
from engine.workloads.tokens import random_words

CONTENT = Content(seed=5)
FIRST, SECOND = Turn((Span(0, 6), Span(1, 4)), 3), Turn((Span(1, 4, 4),), 3)
SESSION = Session("s", (FIRST, SECOND))


def words(*spans: Span) -> str:
    return " ".join(random_words(span, 5) for span in spans)


def test_a_chat_sends_all_messages_with_the_answers_that_came() -> None:
    chat = make_conversation("chat", SESSION, CONTENT)
    first = [{"role": "system", "content": words(Span(0, 6))}, {"role": "user", "content": words(Span(1, 4))}]
    assert chat.ask(FIRST) == {"messages": first}
    heard = Heard()
    assert not chat.hear({"choices": [{"delta": {"role": "assistant", "content": ""}}]}, heard)
    assert chat.hear({"choices": [{"delta": {"content": "so "}}]}, heard)
    assert chat.hear({"choices": [{"delta": {"content": "it"}, "finish_reason": "stop"}]}, heard)
    assert chat.hear({"choices": [{"delta": {"reasoning_content": "hm"}}]}, heard)
    chat.keep(FIRST, heard)
    said = [{"role": "assistant", "content": "so it"}, {"role": "user", "content": words(Span(1, 4, 4))}]
    assert chat.ask(SECOND) == {"messages": [*first, *said]}
    assert heard.finish_reason == "stop"


def test_texts_are_sent_as_they_are_with_the_mark_of_the_run_in_front() -> None:
    messages = (Message("system", "be"), Message("user", "hello"))
    turn = Turn((Span(0, 1), Span(1, 1)), 3, messages=messages)
    result = Turn((Span(2, 1),), 3, messages=(Message("tool", "42", name="look"),))
    chat = make_conversation("chat", Session("s", (turn, result)), Content(mark="[7]"))
    first = [{"role": "system", "content": "[7] be"}, {"role": "user", "content": "hello"}]
    assert chat.ask(turn) == {"messages": first}
    # A result without a call that the server made is a user's message.
    assert chat.ask(result) == {"messages": [*first, {"role": "user", "content": "42"}]}


@pytest.mark.parametrize("api", ["chat", "responses"])
def test_a_recorded_prompt_replaces_what_was_said_before(api: str) -> None:
    turns = (Turn((Span(0, 4), Span(1, 4), Span(2, 1)), 2), Turn((Span(3, 4), Span(4, 2)), 2, keep_tokens=8))
    conversation = make_conversation(api, Session("s", turns), CONTENT)
    name = "messages" if api == "chat" else "input"
    prompt = words(Span(0, 4), Span(1, 4), Span(2, 1))
    assert conversation.ask(turns[0])[name] == [{"role": "user", "content": prompt}]
    conversation.keep(turns[0], Heard(["an answer"]))
    prompt = words(Span(0, 4), Span(1, 4), Span(3, 4), Span(4, 2))
    assert conversation.ask(turns[1])[name] == [{"role": "user", "content": prompt}]


def test_responses_send_all_items_or_what_is_new() -> None:
    for is_stored in (False, True):
        conversation = make_conversation("responses-stored" if is_stored else "responses", SESSION, CONTENT)
        first = conversation.ask(FIRST)["input"]
        heard = Heard()
        assert not conversation.hear({"type": "response.created", "response": {"id": "r1"}}, heard)
        assert conversation.hear({"type": "response.output_text.delta", "delta": "so"}, heard)
        conversation.hear({"type": "response.completed", "response": {"id": "r1", "usage": {"input_tokens": 9}}}, heard)
        conversation.keep(FIRST, heard)
        new = {"role": "user", "content": words(Span(1, 4, 4))}
        assert conversation.ask(SECOND) == (
            {"input": [new], "store": True, "previous_response_id": "r1"}
            if is_stored
            else {"input": [*first[:2], {"role": "assistant", "content": "so"}, new], "store": False}
        )


def test_a_response_that_failed_says_why() -> None:
    heard = Heard()
    failed = {"type": "response.failed", "response": {"error": {"message": "no memory"}}}
    make_conversation("responses", SESSION, CONTENT).hear(failed, heard)
    assert heard.error == "no memory"


def test_completions_send_the_ids_of_everything_and_of_the_answers() -> None:
    content = Content(first_token_id=10, vocab_size=99)
    tokens = make_conversation("completions", SESSION, content)
    first = tokens.ask(FIRST)["prompt"]
    assert first == [*content.token_ids(Span(0, 6)), *content.token_ids(Span(1, 4))]
    heard = Heard()
    assert tokens.hear({"choices": [{"text": "", "token_ids": [7, 8]}]}, heard)
    assert tokens.hear({"choices": [{"text": "so", "token_ids": [9]}]}, heard)
    tokens.keep(FIRST, heard)
    assert tokens.ask(SECOND)["prompt"] == [*first, 7, 8, 9, *content.token_ids(Span(1, 4, 4))]
    # Without ids, as many others stand for the pieces that came.
    silent = make_conversation("completions", SESSION, content)
    silent.ask(FIRST)
    silent.keep(FIRST, Heard(["a", "b", "c"]))
    assert len(silent.ask(SECOND)["prompt"]) == 10 + 3 + 4


def test_counts_come_from_usage_or_timings() -> None:
    details = {"cached_tokens": 7, "cached_tokens_by_tier": {"gpu": 5, "cpu": 2}}
    usage = {"prompt_tokens": 10, "completion_tokens": 3, "prompt_tokens_details": details}
    counts = counts_of(Heard(usage=usage))
    assert (counts.num_prompt_tokens, counts.num_output_tokens, counts.num_cached_tokens) == (10, 3, 7)
    assert counts.cached_by == (("gpu", 5), ("cpu", 2))
    responses = {"input_tokens": 10, "output_tokens": 3, "input_tokens_details": {"cached_tokens": 4}}
    assert counts_of(Heard(usage=responses)).num_cached_tokens == 4
    heard = Heard()
    make_conversation("chat", SESSION, CONTENT).hear({"choices": [], "timings": {"cache_n": 6}}, heard)
    assert counts_of(heard).num_cached_tokens == 6
    assert counts_of(Heard()) == (counts_of(Heard(usage={})))
    assert counts_of(Heard()).num_output_tokens is None


def test_seeds_have_words_of_their_own() -> None:
    assert Content(seed=1).words(Span(0, 40)) != Content(seed=2).words(Span(0, 40))
