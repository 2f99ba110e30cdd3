"""Chat templates of real models: what is found out about them, and that what they write of a message is read back."""

import inspect
import json
import logging
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from engine.dialogue.chat_template import ChatTemplate
from engine.dialogue.events import parse_answer
from engine.dialogue.messages import Dialogue, Message, ToolCall
from engine.dialogue.template_values import RESERVED, template_kwargs
from engine.dialogue.tools import Tool
from engine.embedded_model import embedded_model_path
from engine.errors import ConfigError, InvalidParameterError

FOLDER = Path(__file__).parents[2] / "data" / "chat_templates"
# What is found out: format of calls, of thinking; arguments as text; several calls in a message.
FOUND = {
    "qwen2_5": ("hermes", "none", False, True),
    "qwen3": ("hermes", "qwen3", False, True),
    "qwen3_5_think": ("qwen3_coder", "qwen3", False, True),
    "qwen3_5_nothink": ("qwen3_coder", "qwen3", False, True),
    "qwen3_8": ("qwen3_coder", "qwen3", False, True),
    "nemotron_3_nano": ("qwen3_coder", "qwen3", False, True),
    "llama3_1": ("llama3_json", "none", False, False),
    "llama3_2": ("llama3_json", "none", False, False),
    "glm4moe": ("glm45", "qwen3", False, True),
    "deepseekv3": ("deepseek_v3", "qwen3", True, True),
    "gptoss": ("openai", "none", False, False),
    "lfm2_2_5_v2": ("pythonic", "qwen3", False, True),
    "gemma4_v4": ("gemma4", "gemma4", False, True),
}
# Templates in the manner of models whose own ones are not at hand: how each writes calls.
HEAD = (
    "{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
)
TAIL = "<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
MADE = {
    "mistral": (
        HEAD + "{% if m.tool_calls %}[TOOL_CALLS] [{% for c in m.tool_calls %}{{ (c.function | tojson)[:-1] }}"
        "{% if c.id | length < 9 %}{{ raise_exception('short id') }}{% endif %}"
        ', "id": "{{ c.id[-9:] }}"}{{ \', \' if not loop.last }}{% endfor %}]{% endif %}' + TAIL
    ),
    "mistral_args": (
        HEAD
        + "{% for c in m.tool_calls or [] %}[TOOL_CALLS]{{ c.function.name }}[ARGS]{{ c.function.arguments | tojson }}"
        "{% endfor %}" + TAIL
    ),
    "kimi_k2": (
        HEAD
        + "{% if m.tool_calls %}<|tool_calls_section_begin|>{% for c in m.tool_calls %}<|tool_call_begin|>{{ c.id }}"
        "<|tool_call_argument_begin|>{% if c.function.arguments is string %}{{ c.function.arguments }}{% else %}"
        "{{ c.function.arguments | tojson }}{% endif %}<|tool_call_end|>{% endfor %}<|tool_calls_section_end|>{% endif %}"
        + TAIL
    ),
    "deepseek_v31": (
        HEAD + "{% if m.tool_calls %}<｜tool▁calls▁begin｜>{% for c in m.tool_calls %}<｜tool▁call▁begin｜>"
        "{{ c.function.name + '<｜tool▁sep｜>' + c.function.arguments }}<｜tool▁call▁end｜>{% endfor %}<｜tool▁calls▁end｜>"
        "{% endif %}" + TAIL
    ),
    "minimax_m2": (
        HEAD
        + '{% if m.tool_calls %}<minimax:tool_call>\n{% for c in m.tool_calls %}<invoke name="{{ c.function.name }}">\n'
        '{% for k, v in c.function.arguments.items() %}<parameter name="{{ k }}">{{ v if v is string else v | tojson }}'
        "</parameter>\n{% endfor %}</invoke>\n{% endfor %}</minimax:tool_call>{% endif %}" + TAIL
    ),
    "pythonic": (
        "{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}{% for m in messages %}<|{{ m.role }}|>"
        "{% if m.tool_calls %}[{% for c in m.tool_calls %}{{ c.function.name }}("
        "{% for k, v in c.function.arguments.items() %}"
        "{{ k }}={{ v | tojson }}{{ ', ' if not loop.last }}{% endfor %}){{ ', ' if not loop.last }}{% endfor %}]"
        "{% else %}{{ m.content }}{% endif %}" + TAIL
    ),
}
PARAMETERS = {
    "type": "object",
    "properties": {
        "text": {"type": "string"},
        "count": {"type": "integer"},
        "on": {"type": "boolean"},
        "deep": {"type": "object"},
        "row": {"type": "array"},
    },
}
TOOLS = (Tool("get_weather", "Weather.", PARAMETERS), Tool("list_files", parameters=PARAMETERS))
USER = Message("user", "What now?")


@pytest.fixture(scope="module")
def make():
    """A chat template by its name, or by its text."""

    def make(name, **options):
        tokenizer = AutoTokenizer.from_pretrained(str(embedded_model_path()))
        path = FOLDER / f"{name}.jinja"
        tokenizer.chat_template = MADE[name] if name in MADE else path.read_text() if len(name) < 40 else name
        return ChatTemplate(tokenizer, **options)

    known = {}
    return lambda name: known.setdefault(name, make(name)) if name in (*FOUND, *MADE) else make(name)


@pytest.mark.parametrize("name", FOUND)
def test_what_a_template_does_is_found_out(make, name):
    template = make(name)
    traits = template.traits
    found = (template.format_name, template.reasoning_name, traits.has_text_arguments, traits.has_parallel_calls)
    assert found == FOUND[name]
    assert traits.writes_calls
    assert traits.knows_tools == (name != "deepseekv3")


@pytest.mark.parametrize("name", MADE)
def test_what_a_template_of_other_formats_does_is_found_out(make, name):
    template = make(name)
    assert template.format_name == name.removesuffix("_args")
    assert template.traits.has_text_arguments == (name == "deepseek_v31")
    assert template.traits.has_parallel_calls
    if name.startswith("mistral"):
        assert template.form.is_list == (name == "mistral")


@pytest.mark.parametrize("name", ["deepseek_r1_distill", "gemma"])
def test_a_template_that_knows_no_tools_has_them_listed(make, name):
    template = make(name)
    assert (template.format_name, template.traits.knows_tools) == ("hermes", False)
    assert "knows no tools" in template.reason
    call = ToolCall("get_weather", '{"text":"Bern"}', "call_1")
    messages = (
        Message("user", "Hello."),
        Message("assistant", "A moment.", tool_calls=(call,)),
        Message("tool", "sunny", tool_call_id="call_1"),
        Message("tool", "warm", tool_call_id="call_2"),
        Message("assistant", "It is fine."),
        USER,
    )
    if template.traits.takes_system:
        messages = (Message("system", "Be brief."), *messages)
    text = template.render(Dialogue(messages, TOOLS))
    assert '<tools>\n{"type": "function", "function": {"name": "get_weather"' in text
    assert 'A moment.\n<tool_call>\n{"name": "get_weather", "arguments": {"text":"Bern"}}\n</tool_call>' in text
    assert "<tool_response>\nsunny\n</tool_response>\n<tool_response>\nwarm\n</tool_response>" in text
    assert text.index("<tools>") < text.index("A moment.")
    assert template.traits.takes_system == ("Be brief." in text)
    assert template.render(Dialogue((USER,))).count("<tools>") == 0


def test_a_template_that_writes_calls_in_an_unknown_format_says_so(make):
    unknown = (
        HEAD + "{% for c in m.tool_calls or [] %}@@{{ c.function.name }}@@{{ c.function.arguments }}{% endfor %}" + TAIL
    )
    template = make(unknown)
    assert template.format_name == "none"
    assert "set tool_call_parser" in template.reason
    called = Message("assistant", tool_calls=(ToolCall("get_weather", '{"text": "Bern"}', "1"),))
    prompt = template.render(Dialogue((USER, called), TOOLS))
    assert "@@get_weather@@{'text': 'Bern'}" in prompt, "in the template's own way"
    assert parse_answer(template.answer_format(prompt).parser(TOOLS), "@@f@@{}").content == "@@f@@{}"


def test_the_choice_is_logged_in_a_sentence(make, caplog):
    caplog.set_level(logging.INFO)
    make((FOLDER / "qwen3.jinja").read_text())
    assert caplog.messages == [
        "Calls are read as hermes: its parser reads what the model's chat template writes. Thinking is read as qwen3."
    ]


@pytest.mark.parametrize("option", ["tool_call_parser", "reasoning_parser"])
def test_an_unknown_parser_is_refused_by_name(option):
    tokenizer = AutoTokenizer.from_pretrained(str(embedded_model_path()))
    with pytest.raises(ConfigError, match=f"{option} must be one of auto, none"):
        ChatTemplate(tokenizer, **{option: "vllm"})


def test_parsers_can_be_named(make):
    tokenizer = AutoTokenizer.from_pretrained(str(embedded_model_path()))
    template = ChatTemplate(tokenizer, tool_call_parser="mistral", reasoning_parser="deepseek_r1")
    assert template.markers == {"[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "<think>", "</think>"}
    answer = parse_answer(
        template.answer_format("x").parser(TOOLS), 'hm</think>[TOOL_CALLS][{"name": "f", "arguments": {}}]'
    )
    assert (answer.reasoning, answer.calls[0].name) == ("hm", "f")
    with pytest.raises(ConfigError, match="tokenizer has none"):
        ChatTemplate(tokenizer, tool_call_parser="response_template")


# Values that any template can write: LFM2.5's puts texts in quotation marks without escaping them.
PLAIN = st.text("abcÜ 0-", max_size=8).map(str.strip)
TEXTS = st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="<>\u2028"), max_size=12)
NUMBERS = st.integers(-1000, 1000)


def values(texts, is_exact):
    leaf = st.one_of(texts, NUMBERS, st.booleans(), st.none()) if is_exact else st.one_of(texts, NUMBERS)
    return st.recursive(leaf, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(PLAIN, inner, max_size=2))


@st.composite
def calls(draw, name):
    is_tame = name.startswith(("lfm", "gemma", "qwen3_5", "qwen3_8", "nemotron", "glm", "minimax"))
    texts, is_exact = (PLAIN if is_tame else TEXTS), not is_tame
    arguments = st.fixed_dictionaries(
        {},
        optional={
            "text": texts.map(str.strip) if is_tame else texts,
            "count": NUMBERS,
            "on": st.booleans(),
            "deep": st.dictionaries(PLAIN, values(texts, is_exact), max_size=3),
            "row": st.lists(values(texts, is_exact), max_size=3),
        },
    )
    made = draw(st.lists(st.tuples(st.sampled_from([tool.name for tool in TOOLS]), arguments), min_size=1, max_size=3))
    return [
        ToolCall(tool, json.dumps(value, ensure_ascii=draw(st.booleans())), f"functions.{tool}:{index}")
        for index, (tool, value) in enumerate(made)
    ]


@pytest.mark.parametrize("name", [*FOUND, *MADE])
@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_what_a_template_writes_is_read_back(make, name, data):
    template = make(name)
    made = data.draw(calls(name))
    made = made if template.traits.has_parallel_calls else made[:1]
    content = (
        "" if name in ("llama3_1", "llama3_2", "gptoss", "pythonic") else data.draw(st.sampled_from(["", "Well."]))
    )
    thought = (
        data.draw(st.sampled_from(["", "I think."])) if template.traits.reasoning_keys and name != "gptoss" else ""
    )
    before = Dialogue((USER,), TOOLS)
    message = Message("assistant", content, thought, tuple(made))
    prompt, whole = (
        template.render(before),
        template._render(
            [template._message(USER), template._message(message)], tools=[tool.definition() for tool in TOOLS]
        ),
    )
    if not whole.startswith(prompt):  # the prompt opens or closes thinking otherwise than history does
        prompt = whole[: whole.rindex(template.traits.assistant_header) + len(template.traits.assistant_header)]
    answer = parse_answer(template.answer_format(prompt).parser(TOOLS), whole[len(prompt) :])
    assert [(call.name, json.loads(call.arguments)) for call in answer.calls] == [
        (call.name, json.loads(call.arguments)) for call in made
    ]
    assert all(call.is_complete for call in answer.calls)
    assert answer.reasoning == thought
    assert answer.content.startswith(content)
    if name == "kimi_k2":
        assert [call.call_id for call in answer.calls] == [call.call_id for call in made]


@pytest.mark.parametrize("name", ["qwen3", "glm4moe", "deepseekv3", "kimi_k2", "gptoss"])
def test_results_of_tools_reach_the_prompt(make, name):
    call = ToolCall("get_weather", '{"text": "Bern"}', "functions.get_weather:0")
    messages = (USER, Message("assistant", tool_calls=(call,)), Message("tool", "so sunny", tool_call_id=call.call_id))
    text = make(name).render(Dialogue(messages, TOOLS))
    assert "so sunny" in text
    assert "Bern" in text


def test_malformed_arguments_are_shown_to_the_model(make):
    for name, shown in (("qwen3", '"invalid_json": "{\\"a\\": "'), ("deepseekv3", '\n{"a": \n')):
        call = ToolCall("get_weather", '{"a": ', "functions.get_weather:0")
        assert shown in make(name).render(Dialogue((USER, Message("assistant", tool_calls=(call,)), USER), TOOLS))


@pytest.mark.parametrize(
    ("name", "kwargs", "state"),
    [
        ("qwen3", {}, ""),
        ("qwen3", {"enable_thinking": False}, "closed"),
        ("qwen3_5_think", {}, "open"),
        ("qwen3_5_think", {"enable_thinking": False}, "closed"),
        ("qwen3_5_nothink", {}, "closed"),
        ("deepseek_r1_distill", {}, "open"),
        ("qwen2_5", {}, "closed"),
    ],
)
def test_the_prompt_says_where_thinking_is(make, name, kwargs, state):
    template = make(name)
    prompt = template.render(Dialogue((Message("user", "<think> is a tag"),), template_kwargs=kwargs))
    assert template.thinking_state(prompt) == state
    answer = parse_answer(template.answer_format(prompt).parser(), "<think>\na\n</think>\n\nb")
    assert answer.reasoning == ("" if state == "closed" else "a")


def test_an_answer_can_go_on_within_thinking(make):
    template = make("qwen3")
    prompt = template.render(Dialogue((USER, Message("assistant", "<think>\nSo far")), continues=True))
    assert prompt.endswith("So far")
    assert template.thinking_state(prompt) == "open"


def test_harmony_is_read_without_tools_too(make):
    template = make("gptoss")
    answer = parse_answer(
        template.answer_format(template.render(Dialogue((USER,)))).parser(),
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Yes.<|return|>",
    )
    assert (answer.reasoning, answer.content) == ("Hm.", "Yes.")


def test_a_template_that_takes_thinking_or_content_with_a_call_gets_the_content(make):
    call = ToolCall("get_weather", "{}", "1")
    template = make("gptoss")
    assert not template.traits.has_reasoning_beside_content
    message = Message("assistant", "I look.", "Hm.", (call,))
    assert "I look." in template.render(Dialogue((USER, message, Message("tool", "sun", tool_call_id="1")), TOOLS))


def test_a_clients_values_for_the_template_are_filtered():
    assert template_kwargs({"enable_thinking": False, "x": [1]}, reasoning_effort="low", enable_thinking=True) == {
        "reasoning_effort": "low",
        "enable_thinking": False,
        "thinking": True,
        "x": [1],
    }
    for name in (
        "chat_template",
        "tokenize",
        "messages",
        "tools",
        "tokenizer_kwargs",
        "documents",
        "conversation",
        "a b",
    ):
        with pytest.raises(InvalidParameterError, match="chat_template_kwargs") as error:
            template_kwargs({name: 1})
        assert error.value.param == f"chat_template_kwargs.{name}"


def test_no_value_is_taken_for_an_argument_of_the_renderer():
    assert set(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters) <= RESERVED


def test_values_for_the_template_reach_it(make):
    assert "Reasoning: high" in make("gptoss").render(
        Dialogue((USER,), template_kwargs=template_kwargs({}, reasoning_effort="high"))
    )


@pytest.mark.parametrize(
    "messages",
    [(), (Message("system", "x"), Message("system", "y")), (Message("nobody", "x"),)],
    ids=["none", "two", "role"],
)
def test_what_a_template_refuses_or_fails_with_is_the_requests_fault(make, messages):
    with pytest.raises(InvalidParameterError, match="chat template") as error:
        make("qwen3_5_think").render(Dialogue(messages, TOOLS))
    assert error.value.param == "prompt"


def test_two_calls_are_refused_by_a_template_for_one(make):
    call = ToolCall("get_weather", "{}", "1")
    with pytest.raises(InvalidParameterError, match="single tool-calls"):
        make("llama3_1").render(Dialogue((USER, Message("assistant", tool_calls=(call, call)), USER), TOOLS))


LATE = (
    Message("system", "a"),
    Message("user", "b"),
    Message("assistant", "c"),
    Message("system", "d"),
    Message("user", "e"),
    Message("assistant", "f"),
    Message("user", "g"),
    Message("system", "h"),
)
ONLY_FIRST = (
    "{% for m in messages %}{% if m.role == 'system' and not loop.first %}{{ raise_exception('system comes first') }}"
    "{% endif %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def test_a_system_message_behind_others_is_told_by_the_user_where_the_template_takes_none_there(make):
    strict, lenient = make(ONLY_FIRST), make(HEAD + TAIL)
    assert (strict.traits.takes_late_system, lenient.traits.takes_late_system) == (False, True)
    assert strict.render(Dialogue(LATE)) == (
        "<|system|>a<|end|><|user|>b<|end|><|assistant|>c<|end|><|user|>d\ne<|end|><|assistant|>f<|end|>"
        "<|user|>g\nh<|end|><|assistant|>"
    )
    assert "<|system|>d<|end|><|user|>e" in lenient.render(Dialogue(LATE))
    two = (Message("user", "a"), Message("user", "b"))
    assert strict.render(Dialogue(two)) == "<|user|>a<|end|><|user|>b<|end|><|assistant|>"
