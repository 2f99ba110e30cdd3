"""transformers' own parser of answers: within our events, and as the reference for our parsers."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer
from transformers.utils.chat_parsing import ResponseParser

from engine.dialogue.chat_template import ChatTemplate
from engine.dialogue.events import gather, merge_events, parse_answer
from engine.dialogue.formats import CALL_FORMATS, AnswerParser
from engine.dialogue.reasoning import THINK
from engine.dialogue.response_template import ResponseTemplateParser
from engine.dialogue.tools import Tool
from engine.embedded_model import embedded_model_path

QWEN = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<|im_start|>assistant\n",
    "fields": {
        "reasoning_content": {"open": "<think>", "close_pattern": r"</think>\s*", "content": "text"},
        "tool_calls": {
            "open_pattern": r"\s*<tool_call>",
            "close": "</tool_call>",
            "repeats": True,
            "content": "json",
            "transform": {"type": "function", "function": "{content}"},
        },
        "content": {"close_pattern": r"\s*<\|im_end\|>", "content": "text"},
    },
}
TAGGED = {
    **QWEN,
    "fields": {
        **QWEN["fields"],
        "tool_calls": {
            "open_pattern": r"\s*<tool_call>\s*<function=(?P<name>[^>\n]+)>",
            "close_pattern": r"</function>\s*</tool_call>",
            "repeats": True,
            "content": "xml-inline",
            "content_args": {
                "tag_pattern": r"<parameter=(?P<key>[^>\n]+)>\s*(?P<value>.*?)\s*</parameter>",
            },
            "transform": {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}},
        },
    },
}
GEMMA = {
    "defaults": {"role": "assistant"},
    "start_anchor": ["<|turn>model\n", "<tool_response|>"],
    "fields": {
        "reasoning_content": {"open": "<|channel>thought\n", "close": "<channel|>", "content": "text"},
        "tool_calls": {
            "open_pattern": r"<\|tool_call>call:(?P<name>\w+)",
            "close": "<tool_call|>",
            "repeats": True,
            "content": "json",
            "content_args": {"unquoted_keys": True, "string_delims": [['<|"|>', '<|"|>']]},
            "transform": {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}},
        },
        "content": {"close": ["<turn|>", "<|tool_response>", "<eos>"], "content": "text"},
    },
}
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}}
TOOLS = (Tool("weather", parameters=PARAMETERS),)
QWEN_PIECES = [
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
    '{"name": "weather", "arguments": {"days": 3}}',
    "{",
    "\n",
]
TAGGED_PIECES = [
    "<tool_call>\n<function=weather>\n",
    "<parameter=city>\nx y\n</parameter>\n",
    "</function>\n</tool_call>",
]
GEMMA_PIECES = ["<|channel>thought\n", "<channel|>", "<|tool_call>call:weather{city:", '<|"|>x<|"|>}', "<tool_call|>"]


def documents(*pieces):
    return st.lists(st.sampled_from(pieces) | st.text("ab <{\n", max_size=4), max_size=10).map("".join)


@pytest.mark.parametrize(
    ("template", "pieces"), [(QWEN, QWEN_PIECES), (GEMMA, GEMMA_PIECES), (TAGGED, QWEN_PIECES[:4] + TAGGED_PIECES)]
)
@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_no_answer_raises_and_no_character_is_lost(template, pieces, data):
    text = data.draw(documents(*pieces))
    size = data.draw(st.integers(1, 5))
    parser = ResponseTemplateParser(template, TOOLS, "")
    events = [event for start in range(0, len(text), size) for event in parser.feed(text[start : start + size])]
    events = merge_events([*events, *parser.finish()])
    assert "".join(event.source for event in events) == text
    whole = ResponseTemplateParser(template, TOOLS, "")
    told = gather([*whole.feed(text), *whole.finish()])
    assert (gather(events).calls, gather(events).reasoning) == (told.calls, told.reasoning)


def test_what_was_thought_before_a_malformed_call_is_told_however_the_answer_is_cut():
    parser = ResponseTemplateParser(QWEN, TOOLS, "")
    assert gather([*parser.feed("<think>a</think><tool_call>{</tool_call>"), *parser.finish()]).reasoning == "a"


VALUES = st.dictionaries(
    st.sampled_from(["city", "note"]), st.text('ab 0Ü{}<"\\', max_size=6).map(str.strip), max_size=2
)


def hermes_call(arguments):
    return "<tool_call>\n" + json.dumps({"name": "weather", "arguments": arguments}) + "\n</tool_call>"


def tagged_call(arguments):
    values = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in arguments.items())
    return f"<tool_call>\n<function=weather>\n{values}</function>\n</tool_call>"


@pytest.mark.parametrize(
    ("template", "name", "write"), [(QWEN, "hermes", hermes_call), (TAGGED, "qwen3_coder", tagged_call)]
)
@settings(max_examples=100, deadline=None)
@given(
    thought=st.sampled_from(["", "<think>\nhm\n</think>\n\n"]),
    parts=st.lists(VALUES | st.text("ab {", max_size=4), max_size=5),
)
def test_our_parsers_read_what_transformers_reads(template, name, write, thought, parts):
    text = thought + "\n".join(part if isinstance(part, str) else write(part) for part in parts)
    reference = ResponseParser(template, "", tools=[tool.definition() for tool in TOOLS])
    reference.feed(text)
    message, _ = reference.finalize()
    answer = parse_answer(AnswerParser(THINK.parser(""), CALL_FORMATS[name][0].parser(TOOLS)), text)
    assert [{"name": call.name, "arguments": json.loads(call.arguments)} for call in answer.calls] == [
        call["function"] for call in message.get("tool_calls", [])
    ]
    assert answer.reasoning == message.get("reasoning_content", "").strip()
    assert message.get("content", "").strip() in answer.content  # transformers keeps the last piece of it only


@pytest.mark.parametrize(
    ("template", "text"),
    [
        (QWEN, 'Ah.\n<tool_call>{"name": "weather", "arguments": {"city": "x"}}</tool_call>'),
        (TAGGED, "Ah.\n<tool_call>\n<function=weather>\n<parameter=city>\nx\n</parameter>\n</function>\n</tool_call>"),
        (GEMMA, 'Ah.<|tool_call>call:weather{city:<|"|>x<|"|>}<tool_call|>'),
    ],
)
def test_calls_are_told(template, text):
    answer = parse_answer(ResponseTemplateParser(template, TOOLS, ""), text)
    assert answer.content.strip() == "Ah."
    assert [(call.name, json.loads(call.arguments), call.is_complete) for call in answer.calls] == [
        ("weather", {"city": "x"}, True)
    ]


@pytest.mark.parametrize(
    "text", ["a<tool_call>no JSON</tool_call> b", 'a<tool_call>{"name": "weath', "<tool_call>{}</tool_call>"]
)
def test_what_transformers_cannot_read_is_text(text):
    answer = parse_answer(ResponseTemplateParser(QWEN, TOOLS, ""), text)
    assert answer.calls == ()
    assert answer.content == text


def test_thinking_that_the_prompt_opened_is_read():
    answer = parse_answer(
        ResponseTemplateParser(QWEN, TOOLS, "<|im_start|>assistant\n<think>\n"), "hm\n</think>\n\nyes"
    )
    assert (answer.reasoning.strip(), answer.content) == ("hm", "yes")


def test_a_tokenizers_own_template_is_used_where_no_format_fits():
    tokenizer = AutoTokenizer.from_pretrained(str(embedded_model_path()))
    tokenizer.response_template = GEMMA
    tokenizer.chat_template = "{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}{{ messages[-1].content }}"
    template = ChatTemplate(tokenizer)
    assert template.format_name == "response_template"
    assert template.markers is None
    text = '<|tool_call>call:weather{city:<|"|>x<|"|>}<tool_call|>'
    assert parse_answer(template.answer_format("").parser(TOOLS), text).calls[0].name == "weather"
