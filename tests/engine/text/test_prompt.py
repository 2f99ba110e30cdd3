"""The forms of a context: what is left out of a chat that is too long."""

import pickle

from engine.dialogue.messages import Message, ToolCall
from engine.dialogue.tools import Tool
from engine.text.prompt import ChatPrompt

CALL = ToolCall("weather", '{"city": "Bern"}', "call_1")


def test_pairs_are_plain_messages():
    assert ChatPrompt((("user", "hi"),)) == ChatPrompt((Message("user", "hi"),))


def test_a_prompt_travels_between_processes():
    prompt = ChatPrompt((Message("user", "hi"),), tools=(Tool("f", parameters={"type": "object"}),))
    assert pickle.loads(pickle.dumps(prompt)) == prompt


def test_tools_calls_and_values_of_the_template_count():
    short = ChatPrompt((Message("user", "hi"),))
    assert ChatPrompt(short.messages, tools=(Tool("f", "x" * 1000),)).num_chars > short.num_chars + 1000
    assert ChatPrompt(short.messages, template_kwargs={"a": ["x" * 1000]}).num_chars > short.num_chars + 1000
    called = Message("assistant", tool_calls=(ToolCall("f", "x" * 1000),))
    assert ChatPrompt((*short.messages, called)).num_chars > short.num_chars + 1000


def test_a_result_is_not_left_without_its_call():
    step = (
        Message("user", "?"),
        Message("assistant", tool_calls=(CALL,)),
        Message("tool", "sunny", tool_call_id="call_1"),
    )
    prompt = ChatPrompt((Message("system", "s"), *step * 10), tools=(Tool("weather"),))
    shorter = prompt.shorter()
    assert shorter
    for each in shorter:
        assert [message.role for message in each.messages[:2]] == ["system", "user"]
        assert each.tools == prompt.tools
