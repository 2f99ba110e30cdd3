"""An answer with calls that the template writes in its own way keeps the tokens that the model generated."""

from array import array
from functools import partial
from pathlib import Path

import pytest

from engine.dialogue.messages import Dialogue, Message, ToolCall
from engine.dialogue.tools import Tool
from engine.text.tokenizer import Tokenizer
from engine.text.transcript import NO_MATCH, ConversationTable
from tests.engine.text.trained_tokenizers import save_tokenizer

FOLDER = Path(__file__).parents[2] / "data" / "chat_templates"
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}, "deep": {"type": "object"}}}
TOOLS = (Tool("weather", "Weather.", PARAMETERS),)
CALL = ToolCall("weather", '{"deep": {"a": 1.0, "b": [true, null]}, "city": "Zürich"}', "functions.weather:0")
# As a model writes it that does not care about the template's spaces.
GENERATED = {
    "qwen3": '<tool_call>{"name":"weather","arguments":{"city":"Z\\u00fcrich","deep":{"a":1,"b":[true,null]}}}</tool_call>',
    "qwen3_5_think": (
        'I think.\n</think>\n<tool_call><function=weather><parameter=deep>{"a":1,"b":[true,null]}</parameter>'
        "<parameter=city>\nZürich\n</parameter></function></tool_call>"
    ),
    "qwen2_5": (
        'Well.<tool_call>\n{"arguments": {"city": "Zürich", "deep": {"a": 1, "b": [true, null]}}, "name": "weather"}\n'
        "</tool_call>"
    ),
}
THOUGHTS = {"qwen3_5_think": "I think."}
CONTENTS = {"qwen2_5": "Well."}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tokenizer with the special tokens of these templates."""
    return save_tokenizer("byte_level", tmp_path_factory.mktemp("tokenizer"))


class Session:
    """One conversation with a tokenizer that has the template of a model."""

    def __init__(self, folder, name):
        self.tokenizer = Tokenizer(str(folder))
        self.tokenizer._tokenizer.chat_template = (FOLDER / f"{name}.jinja").read_text()
        self.tokenizer.chat = type(self.tokenizer.chat)(self.tokenizer._tokenizer)
        self.table = ConversationTable(1 << 20, self.tokenizer.cut_tokens)
        self.end = self.tokenizer.eos_token_id

    def encode(self, messages, known=None, tools=TOOLS):
        text = self.tokenizer.chat.render(Dialogue(messages, tools))
        if known is None:
            is_same = partial(self.tokenizer.chat.is_same_answer, tools)
            known = self.table.match_text("a", text, self.tokenizer.fingerprint, is_same)
        return self.tokenizer.encode_prompt(text, known, is_chat=True, max_tokens=100_000), known

    def answer(self, messages, text, tools=TOOLS):
        """The ids of an answer to `messages`, which end with the model's end token."""
        prompt, _ = self.encode(messages, tools=tools)
        ids = [*self.tokenizer._encode(text).ids, self.end]
        self.transcript = self.table.record_turn("a", prompt, ids, self.tokenizer.token_bytes.text(ids))
        return prompt.token_ids + array("I", ids)


@pytest.fixture(params=sorted(GENERATED))
def name(request):
    return request.param


@pytest.fixture
def turns(name):
    """What was asked, and the message that the client sends back."""
    message = Message("assistant", CONTENTS.get(name, ""), THOUGHTS.get(name, ""), (CALL,))
    return (Message("user", "How is it there?"),), message, Message("tool", "sunny", tool_call_id=CALL.call_id)


def test_the_generated_tokens_are_kept_whatever_the_client_made_of_the_call(folder, name, turns):
    asked, message, result = turns
    session = Session(folder, name)
    generated = session.answer(asked, GENERATED[name])
    prompt, known = session.encode((*asked, message, result))
    assert known.token_ids == generated[:-1]
    assert prompt.token_ids[: len(generated)] == generated
    rest = prompt.text[known.num_chars :]
    assert prompt.token_ids[len(known.token_ids) :] == array("I", session.tokenizer._encode(rest).ids)
    assert "sunny" in rest


def test_an_engine_that_never_heard_the_answer_recognises_it_in_its_transcript(folder, name, turns):
    asked, message, result = turns
    session = Session(folder, name)
    generated = session.answer(asked, GENERATED[name])
    chat, cut_texts = session.tokenizer.chat, tuple(session.tokenizer.cut_tokens.values())
    text = chat.render(Dialogue((*asked, message, result), TOOLS))
    is_same = partial(chat.is_same_answer, TOOLS)
    assert session.transcript.match(text, cut_texts, is_same).token_ids == generated[:-1]
    assert len(session.transcript.match(text, cut_texts).token_ids) < len(generated) - 1


def test_the_next_turn_finds_it_by_its_text(folder, name, turns):
    asked, message, result = turns
    session = Session(folder, name)
    generated = session.answer(asked, GENERATED[name])
    second = session.answer((*asked, message, result), "It is sunny.")
    assert second[: len(generated)] == generated
    if name in THOUGHTS:
        return  # its template drops the thinking behind a new question
    history = (*asked, message, result, Message("assistant", "It is sunny."), Message("user", "Thanks."))
    prompt, known = session.encode(history)
    assert prompt.token_ids[: len(second)] == second
    assert len(known.token_ids) == len(second) - 1
    assert len(session.table._conversations["a"].branches) == 1, "one branch goes on, in the template's words"


@pytest.mark.parametrize(
    "edit",
    [
        lambda call: ToolCall(call.name, call.arguments.replace("Zürich", "Bern"), call.call_id),
        lambda call: ToolCall(call.name, call.arguments.replace("true", "1"), call.call_id),
        lambda call: ToolCall("other", call.arguments, call.call_id),
    ],
)
def test_an_edited_call_is_tokenised_as_a_fresh_session_would(folder, name, turns, edit):
    asked, message, result = turns
    session = Session(folder, name)
    session.answer(asked, GENERATED[name])
    edited = Message("assistant", message.content, message.reasoning, (edit(CALL),))
    history = (*asked, edited, result)
    fresh, _ = session.encode(history, NO_MATCH)
    assert session.encode(history)[0].token_ids == fresh.token_ids


def test_thinking_that_the_client_left_out_is_not_the_same(folder):
    session = Session(folder, "qwen3_5_think")
    asked = (Message("user", "How is it there?"),)
    session.answer(asked, GENERATED["qwen3_5_think"])
    history = (*asked, Message("assistant", tool_calls=(CALL,)), Message("tool", "sunny"))
    fresh, _ = session.encode(history, NO_MATCH)
    assert session.encode(history)[0].token_ids == fresh.token_ids


def test_an_answer_without_calls_is_the_same_only_to_the_last_space(folder):
    session = Session(folder, "qwen3")
    asked = (Message("user", "Hello."),)
    session.answer(asked, "Hello there. ")
    history = (*asked, Message("assistant", "Hello there."), Message("user", "x"))
    fresh, _ = session.encode(history, NO_MATCH)
    assert session.encode(history)[0].token_ids == fresh.token_ids


def test_a_text_that_looks_like_a_number_is_the_same_only_to_the_last_digit(folder):
    """The schema says that it is a text: 1.1 is another one than 1.10."""
    session = Session(folder, "qwen3_5_think")
    asked = (Message("user", "How is it there?"),)
    value = "<tool_call><function=weather><parameter=city>1.10</parameter></function></tool_call>"
    session.answer(asked, f"I think.\n</think>\n{value}")
    for city, is_same in (("1.10", True), ("1.1", False)):
        call = ToolCall("weather", f'{{"city": "{city}"}}')
        history = (*asked, Message("assistant", "", "I think.", (call,)), Message("tool", "sunny"))
        fresh, _ = session.encode(history, NO_MATCH)
        assert (session.encode(history)[0].token_ids != fresh.token_ids) == is_same


def test_what_looks_like_a_call_is_text_if_nothing_can_be_called(folder):
    session = Session(folder, "qwen3")
    asked = (Message("user", "How is a call written?"),)
    session.answer(asked, '<tool_call>{"name":"f","arguments":{}}</tool_call>', tools=())
    written = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'
    history = (*asked, Message("assistant", written), Message("user", "Thanks."))
    fresh, _ = session.encode(history, NO_MATCH, tools=())
    assert session.encode(history, tools=())[0].token_ids == fresh.token_ids


def test_an_agents_loop_computes_only_what_is_new(folder):
    """Twenty steps with two parallel calls each: what is tokenised again is the results and the headers."""
    session = Session(folder, "qwen2_5")
    messages = (Message("user", "How is it there?"),)
    num_new = []
    for step in range(20):
        prompt, known = session.encode(messages)
        num_new.append(len(prompt.token_ids) - len(known.token_ids))
        call = f'{{"name":"weather","arguments":{{"city":"town {step}"}}}}'
        session.answer(messages, f"<tool_call>{call}</tool_call><tool_call>{call}</tool_call>")
        calls = tuple(
            ToolCall("weather", f'{{"city": "town {step}"}}', f"functions.weather:{2 * step + n}") for n in (0, 1)
        )
        results = tuple(Message("tool", f"{step}", tool_call_id=call.call_id) for call in calls)
        messages = (*messages, Message("assistant", tool_calls=calls), *results)
    template = session.tokenizer.chat
    shown = template.render(Dialogue((Message("user", "x"), Message("tool", "19"), Message("tool", "19"))))
    without = template.render(Dialogue((Message("user", "x"),)))
    assert (
        max(num_new[1:]) <= len(session.tokenizer._encode(shown).ids) - len(session.tokenizer._encode(without).ids) + 8
    )
