"""Loops of calls as agents send them: whatever a client makes of the messages, each turn computes what is new in it.

For the chat template of each family of models, and a model that writes its calls with other spaces than the template.
"""

from __future__ import annotations

import json
import re
from array import array
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import pytest
from transformers import AddedToken, AutoTokenizer

from engine.dialogue.events import ParsedAnswer, parse_answer
from engine.dialogue.messages import Dialogue, Message, ToolCall
from engine.dialogue.tools import Tool
from engine.text.prompt import ChatPrompt
from engine.text.prompt_encoder import EncodedPrompt, PromptEncoder
from engine.text.tokenizer import Tokenizer
from engine.text.transcript import ConversationTable, common_prefix_len
from tests.engine.text.trained_tokenizers import save_tokenizer

FOLDER = Path(__file__).parents[2] / "data" / "chat_templates"
# What ends an answer that calls, by template; and whether the model thinks.
ENDS = {
    "qwen2_5": ("<|im_end|>", False),
    "qwen3": ("<|im_end|>", True),
    "qwen3_5_think": ("<|im_end|>", True),
    "qwen3_5_nothink": ("<|im_end|>", False),
    "qwen3_8": ("<|im_end|>", True),
    "nemotron_3_nano": ("<|im_end|>", True),
    "llama3_1": ("<|eot_id|>", False),
    "llama3_2": ("<|eot_id|>", False),
    "glm4moe": ("<|observation|>", True),
    "gptoss": ("<|call|>", True),
    "lfm2_2_5_v2": ("<|im_end|>", True),
    "gemma4_v4": ("<|tool_response>", False),
}
# Prompts begin an answer with <think>, of which the history says nothing.
DEEPSEEK_END = "<\uff5cend\u2581of\u2581sentence\uff5c>"
DROPPING = {"deepseekv3": (DEEPSEEK_END, True)}
SPECIAL = (
    *("<|im_start|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|user|>", "<|assistant|>"),
    *(
        "<|observation|>",
        "<|system|>",
        "<|start|>",
        "<|end|>",
        "<|message|>",
        "<|channel|>",
        "<|constrain|>",
        "<|call|>",
    ),
    *(
        "<|return|>",
        "<|turn>",
        "<turn|>",
        "<|tool_call>",
        "<tool_call|>",
        "<|tool_response>",
        "<tool_response|>",
        '<|"|>',
    ),
    *("<|tool_call_start|>", "<|tool_call_end|>", DEEPSEEK_END),
)
# What the model writes in place of what its template writes.
OTHER_WORDS = (
    (r" to=functions\.(\w+)<\|channel\|>commentary json", r"<|channel|>commentary to=functions.\1 <|constrain|>json"),
    ('": ', '":'),
    (', "', ',"'),
    ("</tool_call>\n<tool_call>", "</tool_call><tool_call>"),
    ("</think>\n\n", "</think>\n"),
    (r"\), time\(", "),time("),
)
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}, "opts": {"type": "object"}}}
TOOLS = (Tool("weather", "Weather.", PARAMETERS), Tool("time", "Time.", PARAMETERS))
USER = Message("user", "How is it there?")


class Client(NamedTuple):
    """How a client sends back what it was told."""

    keeps_reasoning: bool = True
    rewrites: bool = False
    renames: bool = False

    def sends(self, answer: ParsedAnswer, number: int) -> Message:
        """The message of the answer with this number."""
        calls = tuple(
            ToolCall(call.name, self._arguments(call.arguments), f"functions.{call.name}:{2 * number + index}")
            for index, call in enumerate(answer.calls)
        )
        content = answer.content.strip() if self.rewrites else answer.content
        return Message("assistant", content, answer.reasoning if self.keeps_reasoning else "", calls)

    def _arguments(self, text: str) -> str:
        if not self.rewrites:
            return text
        value = json.loads(text)
        return json.dumps(dict(reversed(value.items())), indent=2, ensure_ascii=True)


CLIENTS = {
    "faithful": Client(),
    "forgets what was thought": Client(keeps_reasoning=False),
    "rewrites": Client(rewrites=True),
    "forgets and rewrites": Client(keeps_reasoning=False, rewrites=True),
}


class Loop:
    """One conversation with a model of this template, as the engine has it."""

    def __init__(self, folder: Path, name: str, *, restores: bool = True) -> None:
        self.end, self.thinks = {**ENDS, **DROPPING}[name]
        self.tokenizer = Tokenizer(str(folder / name))
        self.table = ConversationTable(1 << 24, self.tokenizer.cut_tokens)
        self.encoder = PromptEncoder(
            self.tokenizer,
            self.table,
            max_model_len=1_000_000,
            vocab_size=1_000_000,
            max_num_waiting=1,
            restores_reasoning=restores,
        )
        self.num_calls = 2 if self.tokenizer.chat.traits.has_parallel_calls else 1

    def encode(self, messages: tuple[Message, ...], tools: tuple[Tool, ...] = TOOLS) -> EncodedPrompt:
        return self.encoder._encode_any(ChatPrompt(messages, tools=tools), "c", None, 1_000_000)

    def answer(self, encoded: EncodedPrompt, text: str, end: str) -> tuple[ParsedAnswer, list[int]]:
        """What the client is told of this answer, and all tokens up to its end."""
        assert encoded.chat is not None
        assert encoded.answer_format is not None
        ids = [*self.tokenizer.encode_marker(text), *self.tokenizer.encode_marker(end)]
        detokenizer = self.tokenizer.detokenizer((), keeps_markers=True)
        for token_id in ids[:-1]:
            detokenizer.append(token_id)
        parsed = parse_answer(encoded.answer_format.parser(TOOLS), detokenizer.text)
        tokens = [*encoded.transcript.token_ids, *ids]
        turn = encoded.chat.answered(parsed, len(tokens))
        self.table.record_turn("c", encoded.transcript, ids, self.tokenizer.token_bytes.text(ids), turn)
        return parsed, tokens

    def text_of_calls(self, prompt: str, messages: tuple[Message, ...], number: int) -> str:
        """What the model writes: as its template does, but with other spaces and breaks."""
        arguments = f'{{"city": "Zürich {number}", "opts": {{"a": [1, true], "b": "x"}}}}'
        calls = tuple(
            ToolCall(tool.name, arguments, f"functions.{tool.name}:{2 * number + index}")
            for index, tool in enumerate(TOOLS[: self.num_calls])
        )
        thought = f"I think {number}." if self.thinks else ""
        message = Message("assistant", "", thought, calls)
        whole = self.tokenizer.chat.render(Dialogue((*messages, message, *results(message, number)), TOOLS))
        if not whole.startswith(prompt):  # what begins the answer in the prompt is not in the history
            header = self.tokenizer.chat.traits.assistant_header
            start = whole.rfind(header, 0, whole.rfind(self.end)) + len(header)
            text = f"{thought}</think>{whole[start : whole.index(self.end, start)]}"
        else:
            text = whole[len(prompt) : whole.index(self.end, len(prompt))]
        for pattern, generated in OTHER_WORDS:
            text = re.sub(pattern, generated, text)
        return text


def results(message: Message, number: int) -> tuple[Message, ...]:
    return tuple(
        Message("tool", f"sunny {number}", tool_call_id=call.call_id, name=call.name) for call in message.tool_calls
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer with the special tokens of all families, under the name of each template."""
    root = tmp_path_factory.mktemp("tokenizers")
    tokenizer = AutoTokenizer.from_pretrained(str(save_tokenizer("byte_level", root / "plain")))
    tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken(t, normalized=False) for t in SPECIAL]})
    tokenizer.add_tokens(["<think>", "</think>", "<tool_call>", "</tool_call>"])
    for name in (*ENDS, *DROPPING):
        tokenizer.chat_template = (FOLDER / f"{name}.jinja").read_text()
        tokenizer.save_pretrained(root / name)
    return root


class Told(NamedTuple):
    """A step of a loop."""

    encoded: EncodedPrompt
    text: str
    tokens: list[int]
    sent: Message


def run(
    loop: Loop, client: Client, messages: tuple[Message, ...], numbers: range
) -> tuple[tuple[Message, ...], list[Told]]:
    """Steps that call, one for each number. Returns the messages behind them, too."""
    told: list[Told] = []
    for number in numbers:
        encoded = loop.encode(messages)
        assert encoded.chat is not None
        text = loop.text_of_calls(encoded.transcript.text, encoded.chat.messages, number)
        answer, tokens = loop.answer(encoded, text, loop.end)
        assert len(answer.calls) == loop.num_calls
        assert bool(answer.reasoning) == loop.thinks
        sent = client.sends(answer, number)
        messages = (*messages, sent, *results(sent, number))
        told.append(Told(encoded, text, tokens, sent))
    return messages, told


def check_nothing_again(told: list[Told]) -> None:
    """Each prompt begins with the tokens before, but for the one that ended the answer: that one was never computed."""
    for before, after in pairwise(told):
        kept = before.tokens[:-1]
        assert list(after.encoded.transcript.token_ids[: len(kept)]) == kept
        assert after.encoded.recomputed is None


@pytest.mark.parametrize("client", CLIENTS)
@pytest.mark.parametrize("name", ENDS)
def test_each_step_computes_what_is_new(folder: Path, name: str, client: str) -> None:
    loop = Loop(folder, name)
    _, told = run(loop, CLIENTS[client], (USER,), range(20))
    check_nothing_again(told)
    if name != "gemma4_v4":  # whose calls can be written in one way
        assert told[0].text not in told[-1].encoded.transcript.text, "the template writes other words"
    conversation = loop.table.find("c")
    assert conversation is not None
    assert len(conversation.branches) == 1


@pytest.mark.parametrize("name", ENDS)
def test_a_replica_that_has_only_the_transcript_knows_the_answer_too(folder: Path, name: str) -> None:
    """As it comes from the store."""
    loop = Loop(folder, name)
    client = CLIENTS["rewrites"]
    messages, told = run(loop, client, (USER,), range(3))
    conversation = loop.table.find("c")
    assert conversation is not None
    stored = conversation.branches[-1]
    other = Loop(folder, name)
    encoded = other.encoder._encode_any(ChatPrompt(messages, tools=TOOLS), None, stored, 1_000_000)
    kept = told[-1].tokens[:-1]
    assert list(encoded.transcript.token_ids[: len(kept)]) == kept


def test_a_replica_that_goes_on_with_an_answer_has_the_prompt_of_the_first_one(folder: Path) -> None:
    """It has never heard what was thought, so it could not put it back."""
    loop, other = Loop(folder, "qwen3_8"), Loop(folder, "qwen3_8")
    messages, _ = run(loop, CLIENTS["forgets what was thought"], (USER,), range(2))
    first = loop.encode(messages)
    assert first.is_known
    prompt = ChatPrompt(messages, tools=TOOLS)
    resumed = other.encoder.take_prompt(prompt, first.transcript)
    assert resumed.transcript == first.transcript
    assert resumed.answer_format == first.answer_format
    assert resumed.chat is not None
    assert first.chat is not None
    assert resumed.chat.key == first.chat.key
    assert other.encode(messages).transcript.token_ids != first.transcript.token_ids


def reason_of(encoded: EncodedPrompt) -> str:
    assert encoded.recomputed is not None
    reason, num_tokens = encoded.recomputed
    assert num_tokens > 0
    return reason


def test_a_template_that_drops_what_begins_an_answer_says_so(folder: Path) -> None:
    loop = Loop(folder, "deepseekv3")
    messages, (told,) = run(loop, CLIENTS["faithful"], (USER,), range(1))
    encoded = loop.encode(messages)
    num_same = common_prefix_len(array("I", told.tokens), encoded.transcript.token_ids)
    assert encoded.recomputed == ("template_dropped", len(told.tokens) - 1 - num_same)


@pytest.mark.parametrize(("name", "drops"), [("qwen3", True), ("qwen3_5_think", True), ("qwen3_8", False)])
def test_thinking_that_a_template_drops_at_the_next_question_is_counted(folder: Path, name: str, drops: bool) -> None:
    for client in CLIENTS.values():
        loop = Loop(folder, name)
        messages, told = run(loop, client, (USER,), range(3))
        asked = loop.encode((*messages, Message("user", "And now?")))
        assert (asked.recomputed is not None) == drops
        if drops:
            num_same = common_prefix_len(asked.transcript.token_ids, array("I", told[-1].tokens))
            assert asked.recomputed == ("template_dropped", len(told[-1].tokens) - 1 - num_same)


def test_thinking_that_is_not_put_back_is_an_edit(folder: Path) -> None:
    loop = Loop(folder, "qwen3", restores=False)
    _, told = run(loop, CLIENTS["forgets what was thought"], (USER,), range(2))
    assert reason_of(told[-1].encoded) == "edited"
    assert "I think 0" not in told[-1].encoded.transcript.text
    loop = Loop(folder, "qwen3", restores=False)
    _, told = run(loop, CLIENTS["faithful"], (USER,), range(2))
    check_nothing_again(told)


def test_changes_are_told_apart(folder: Path) -> None:
    loop = Loop(folder, "qwen3")
    system = Message("system", "Be brief.")
    messages, _ = run(loop, CLIENTS["forgets what was thought"], (system, USER), range(3))
    assert loop.encode(messages).recomputed is None
    assert reason_of(loop.encode(messages, TOOLS[:1])) == "tools_changed"
    assert reason_of(loop.encode((Message("system", "Be long."), *messages[1:]))) == "edited"
    shortened = replace(messages[3], content="(left out)")
    assert reason_of(loop.encode((*messages[:3], shortened, *messages[4:]))) == "edited"
    fork = (*messages[:5], Message("user", "And now?"))
    assert loop.encode((*messages[:2], Message("user", "Another one."))).recomputed is None, "nothing of it was said"
    assert reason_of(loop.encode(fork)) == "template_dropped"
    assert loop.encode((Message("user", "Something else."), messages[2])).recomputed is None, "another dialogue"


def test_an_answer_that_is_not_recognised_is_tokenised_again(folder: Path) -> None:
    loop = Loop(folder, "qwen2_5")
    loop.answer(loop.encode((USER,)), "It is sunny. ", loop.end)
    history = (USER, Message("assistant", "It is sunny."), Message("user", "Thanks."))
    assert reason_of(loop.encode(history)) == "retokenised"


def test_what_was_thought_is_put_back_only_into_what_was_said(folder: Path) -> None:
    loop = Loop(folder, "qwen3_8")
    messages, _ = run(loop, CLIENTS["forgets what was thought"], (USER,), range(1))
    assert "I think 0." in loop.encode(messages).transcript.text
    edited = replace(messages[1], tool_calls=messages[1].tool_calls[:1])
    for changed in ((USER, edited, *messages[2:]), (replace(USER, content="Other."), *messages[1:])):
        assert "I think" not in loop.encode(changed).transcript.text
    sent = replace(messages[1], reasoning="Something else.")
    assert "I think 0." not in loop.encode((USER, sent, *messages[2:])).transcript.text


def test_a_prompt_that_fits_only_without_it_has_none(folder: Path) -> None:
    loop = Loop(folder, "qwen3_8")
    messages, _ = run(loop, CLIENTS["forgets what was thought"], (USER,), range(1))
    whole = loop.encode(messages)
    loop.encoder._max_model_len = len(whole.transcript.token_ids) - 1
    bare = loop.encode(messages)
    assert "I think" not in bare.transcript.text
