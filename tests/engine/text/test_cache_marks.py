"""From marks in messages to spans of tokens, for the chat templates of many families of models."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from engine.core.retention import KeptSpan, RetentionHint
from engine.dialogue.chat_template import ChatTemplate
from engine.dialogue.messages import CacheMark, Dialogue, Message, ToolCall
from engine.dialogue.tools import Tool
from engine.embedded_model import embedded_model_path
from engine.errors import InvalidParameterError
from engine.tenant import LOCAL_TENANT
from engine.text.cache_marks import MAX_PIECES, CacheWish, TextMark, find_marks, hint_of
from engine.text.prompt import ChatPrompt, TextPrompt, TokenPrompt
from engine.text.prompt_encoder import PromptEncoder
from engine.text.tokenizer import Tokenizer
from engine.text.transcript import ConversationTable

FOLDER = Path(__file__).parents[2] / "data" / "chat_templates"
TOOLS = (Tool("look", "Looks something up.", {"type": "object", "properties": {"word": {"type": "string"}}}),)
CALL = ToolCall("look", '{"word": "tide"}', "call_123456")
MESSAGES = (
    Message("system", "You know the sea. Today is Monday."),
    Message("user", "  First a fact. Then a question?\n"),
    Message("assistant", "I look it up.", tool_calls=(CALL,)),
    Message("tool", "A very long table of tides.", tool_call_id="call_123456", name="look"),
    Message("assistant", "The tide is high."),
    Message("user", "Thank you. And now?"),
)
NO_SYSTEM = ("gemma",)  # which takes no tools either


@pytest.fixture(scope="module", params=sorted(path.stem for path in FOLDER.glob("*.jinja") if path.stem != "gemma"))
def chat(request):
    tokenizer = AutoTokenizer.from_pretrained(str(embedded_model_path()))
    tokenizer.chat_template = (FOLDER / f"{request.param}.jinja").read_text()
    return ChatTemplate(tokenizer)


def marked(index, *marks):
    return tuple(
        replace(message, cache_marks=marks) if number == index else message for number, message in enumerate(MESSAGES)
    )


def found(chat, messages, *, may_lose=0):
    """The rendered prompt, and the places of the marks. may_lose: of the marks, at most so many may have no place."""

    def render(some):
        return chat.render(Dialogue(tuple(some), TOOLS))

    text = render(messages)
    marks, num_lost = find_marks(messages, text, render, 1800.0)
    assert num_lost <= may_lose
    return text, marks


@pytest.mark.parametrize(
    ("index", "said"), [(0, "You know the sea."), (1, "First a fact."), (4, "The tide"), (5, "Thank you.")]
)
def test_a_mark_within_a_message_is_where_its_text_ends(chat, index, said):
    end = MESSAGES[index].content.index(said) + len(said)
    text, (mark,) = found(chat, marked(index, CacheMark(end=end, ttl_s=300.0)))
    assert text[: mark.end].endswith(said)
    assert mark.start is None


def test_a_mark_on_a_message_covers_what_the_template_writes_behind_it(chat):
    text, (mark,) = found(chat, marked(0, CacheMark(ttl_s=300.0)))
    head = text[: mark.end]
    assert "Today is Monday." in head
    assert "Looks something up." in head  # wherever the template tells the tools
    assert text[mark.end :].lstrip().startswith("First a fact.")
    text, (mark,) = found(chat, marked(5, CacheMark(ttl_s=300.0)))
    assert mark.end == len(text)


def test_a_piece_is_its_text(chat):
    text, (mark,) = found(chat, marked(3, CacheMark(0, None)))
    assert mark.start is not None
    assert text[mark.start : mark.end] == MESSAGES[3].content


def test_many_marks_are_found_at_once(chat):
    messages = tuple(
        replace(message, cache_marks=(CacheMark(0, None), CacheMark(ttl_s=3600.0 - index)))
        for index, message in enumerate(MESSAGES)
    )
    text, marks = found(chat, messages, may_lose=2)
    pieces = sorted((mark.start, mark.end) for mark in marks if mark.start is not None)
    shown = [message.content.strip() for message in MESSAGES if message.content.strip() in text]
    assert sorted(text[start:end] for start, end in pieces) == sorted(shown)
    ends = sorted(mark.end for mark in marks if mark.start is None)
    assert len(ends) >= len(shown)
    assert ends[-1] == len(text)


def test_a_mark_that_a_longer_beginning_covers_is_left_out(chat):
    messages = tuple(replace(message, cache_marks=(CacheMark(ttl_s=300.0),)) for message in MESSAGES)
    text, marks = found(chat, messages)
    assert marks == [TextMark(None, len(text), 300.0)]


def test_a_message_that_the_template_does_not_show_loses_its_mark():
    messages = (Message("system", "hidden", cache_marks=(CacheMark(end=3),)), Message("user", "shown"))
    marks, num_lost = find_marks(messages, "shown", lambda some: some[1].content, 1800.0)
    assert (marks, num_lost) == ([], 1)


def test_a_template_that_refuses_the_marked_text_loses_the_marks():
    def refuse(some):
        raise InvalidParameterError("no", param="prompt")

    messages = (Message("user", "shown", cache_marks=(CacheMark(end=3),)),)
    assert find_marks(messages, "shown", refuse, 1800.0) == ([], 1)


def test_too_many_pieces_are_refused():
    messages = [Message("user", "a", cache_marks=(CacheMark(0, None),))] * (MAX_PIECES + 1)
    with pytest.raises(InvalidParameterError, match="mark the largest ones"):
        find_marks(messages, "a" * len(messages), lambda some: "".join(each.content for each in some), 1800.0)


NEUTRAL, NOTHING_ELSE = 50, 0


@pytest.mark.parametrize(
    ("wish", "marks", "hint"),
    [
        (CacheWish(), (), None),
        (CacheWish(compared_to="resp_1"), (), None),
        (CacheWish(ttl_s=1800.0), (), RetentionHint((KeptSpan(ttl_s=1800.0),))),
        (CacheWish(keeps_only_marked=True), (), RetentionHint(rest_priority=0)),
        (CacheWish(), ((None, 10, 300.0),), RetentionHint((KeptSpan(0, 10, ttl_s=300.0),))),
        (CacheWish(), ((None, 10, None),), RetentionHint((KeptSpan(0, 10, ttl_s=1800.0),))),
        (
            CacheWish(ttl_s=43200.0, keeps_only_marked=True),
            ((None, 10, None),),
            RetentionHint((KeptSpan(0, 10, ttl_s=43200.0),), rest_priority=0),
        ),
        (  # a long time for the beginning, a short one for what follows
            CacheWish(),
            ((None, 10, 3600.0), (None, 30, 300.0)),
            RetentionHint((KeptSpan(0, 10, ttl_s=3600.0), KeptSpan(10, 30, ttl_s=300.0))),
        ),
        (  # the middle may go, the rest is kept
            CacheWish(ttl_s=300.0),
            ((10, 30, None),),
            RetentionHint(
                (KeptSpan(0, 10, ttl_s=300.0), KeptSpan(10, 30, priority=0), KeptSpan(30, None, ttl_s=300.0))
            ),
        ),
        (CacheWish(), ((10, 20, None), (20, 30, None)), RetentionHint((KeptSpan(10, 30, priority=0),))),
        (CacheWish(), ((None, 0, 300.0),), RetentionHint()),
    ],
)
def test_what_is_to_become_of_which_tokens(wish, marks, hint):
    assert hint_of(wish, [TextMark(*mark) for mark in marks], lambda char: char) == hint


def test_as_many_pieces_as_there_may_be_make_a_hint():
    marks = [TextMark(3 * number + 1, 3 * number + 2, None) for number in range(MAX_PIECES)]
    ends = [TextMark(None, 3, 1.0), TextMark(None, 1000, 2.0)]
    assert hint_of(CacheWish(ttl_s=0.5), [*marks, *ends], lambda char: char) is not None


@pytest.fixture(scope="module")
def encoder():
    tokenizer = Tokenizer(str(embedded_model_path()))
    conversations = ConversationTable(1 << 20, tokenizer.cut_tokens)
    return tokenizer, PromptEncoder(tokenizer, conversations, max_model_len=512, vocab_size=1 << 20, max_num_waiting=1)


async def encode(encoder, prompt, wish=CacheWish(), room=512):  # noqa: B008
    return await encoder[1].encode(
        prompt, tenant=LOCAL_TENANT, conversation_id=None, history=None, room=room, wish=wish
    )


CHAT = (
    Message("system", "You help."),
    Message("user", "My cat is called Tom. What is it called?"),
    Message("assistant", "Tom."),
    Message("user", "And my dog?"),
)


async def test_spans_are_of_the_prompts_own_tokens(encoder):
    messages = (
        replace(CHAT[0], cache_marks=(CacheMark(ttl_s=3600.0),)),
        replace(CHAT[1], cache_marks=(CacheMark(end=21, ttl_s=300.0),)),
        CHAT[2],
        CHAT[3],
    )
    encoded = await encode(encoder, ChatPrompt(messages))
    token_ids = encoded.transcript.token_ids
    assert token_ids == (await encode(encoder, ChatPrompt(CHAT))).transcript.token_ids
    system, user = encoded.retention.spans
    decode = encoder[0].decode
    assert "You help." in decode(token_ids[: system.end])
    assert decode(token_ids[system.end : user.end]) == "My cat is called Tom."
    assert (system.ttl_s, user.ttl_s) == (3600.0, 300.0)


async def test_marks_of_messages_that_are_left_out_are_left_out(encoder):
    long = [replace(CHAT[1], content="word " * 60, cache_marks=(CacheMark(ttl_s=3600.0),)), CHAT[2]] * 3
    messages = (*long, replace(CHAT[3], cache_marks=(CacheMark(ttl_s=300.0),)))
    encoded = await encode(encoder, ChatPrompt(messages, drops_oldest=True), room=160)
    whole = len(encoded.transcript.token_ids)
    assert whole <= 160
    assert encoded.retention.spans[-1].end == whole
    assert encoded.num_lost_marks == 0


@pytest.mark.parametrize("prompt", [TextPrompt("My cat is called Tom."), TokenPrompt((1, 2, 3)), ChatPrompt(CHAT)])
async def test_a_wish_for_the_whole_needs_no_marks(encoder, prompt):
    assert (await encode(encoder, prompt)).retention is None
    encoded = await encode(encoder, prompt, CacheWish(ttl_s=43200.0))
    assert encoded.retention == RetentionHint((KeptSpan(ttl_s=43200.0),))


async def test_a_prompt_that_is_known_as_tokens_keeps_its_marks(encoder):
    prompt = ChatPrompt((*CHAT[:3], replace(CHAT[3], cache_marks=(CacheMark(end=3),))))
    encoded = await encode(encoder, prompt)
    assert encoder[1].take_prompt(prompt, encoded.transcript).retention == encoded.retention
