"""Seeded synthetic dialogues in which tools are offered, asked for and called, and their results repeated.

Owns the wording of what the tools model speaks beside the recall model's language. Messages and tools are plain JSON data, as
a chat template takes them; the same seed gives the same dialogue on every machine. Standard library only.
"""

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from tools.embedded_model.dialogues import (
    draw_code,
    draw_favourite,
    draw_message,
    draw_name,
    draw_system,
    draw_town,
    generate_turns,
    invented,
    small_talk_sentence,
)

Json = dict[str, Any]

# What comes before the result of a tool in the answer, and between several results.
FOUND = "here is what I found: "
BETWEEN = "; "
NO_TOOL_ANSWER = "I have no tool for that."


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


# What is asked for by its own word, which then is in the tool's name, too.
NOUNS = _words(
    "weather time price population address phone capital temperature news score schedule balance status recipe "
    "definition translation size age stock user order hotel restaurant traffic rate secret number"
)
_NAMES = (
    "get_{n}",
    "get_{n}",
    "get_{n}",
    "{n}",
    "find_{n}",
    "{n}_of",
    "lookup_{n}",
    "get_{n}_of",
    "search_{n}",
    "get{N}",
)
_PARAMETERS = _words(
    "city town place location name query item key id word country user_id text symbol subject question code"
)
_QUESTIONS = (
    "what is the {n} in {v}?",
    "what is the {n} in {v}?",
    "what is the {n} of {v}?",
    "what is the {n} for {v}?",
    "what's the {n} in {v}?",
    "how is the {n} in {v}?",
    "what is the {n} like in {v}?",
    "what is the {n} in {v} {now}?",
    "can you tell me the {n} in {v}?",
    "find the {n} of {v}",
    "tell me the {n} in {v}",
    "get the {n} for {v}",
    "look up the {n} of {v}",
    "the {n} in {v} please",
    "{n} in {v}?",
)
_TWO_QUESTIONS = (
    "what is the {n} in {v} and in {w}?",
    "what is the {n} of {v} and of {w}?",
    "get the {n} for {v} and for {w}",
)
_NOW = ("today", "now", "right now", "tomorrow", "this week")
_WAYS = _words("flight route distance train fare trip")
_WAY_PARAMETERS = (("from", "to"), ("origin", "destination"), ("start", "end"), ("source", "target"))
_WAY_QUESTIONS = (
    "what is the {n} from {v} to {w}?",
    "find the {n} from {v} to {w}",
    "find a {n} from {v} to {w}",
    "get me the {n} from {v} to {w}",
)
_COMMANDS = ("call {name} with {v}", "use {name} for {v}", "use {name} with {v}", "please call {name} with {v}")
_TWO_COMMANDS = ("call {name} with {v} and with {w}", "use {name} for {v} and for {w}")
_PLAIN_COMMANDS = ("call {name}", "use {name}", "please call {name}")
_SUMS = (
    ("add", ("add {v} and {w}", "what is {v} plus {w}?", "what is {v} + {w}?", "what is {v}+{w}?")),
    ("multiply", ("multiply {v} by {w}", "what is {v} times {w}?", "what is {v} * {w}?", "what is {v}*{w}?")),
    ("subtract", ("what is {v} minus {w}?", "what is {v} - {w}?")),
)


@dataclass(frozen=True, slots=True)
class FakeTool:
    """A function that the model may call.

    noun:       the word by which it is asked for; empty = by its name only.
    parameters: (name, whether it is a number) of each.
    questions:  how two values are asked for.
    """

    name: str
    noun: str
    parameters: tuple[tuple[str, bool], ...]
    questions: tuple[str, ...] = ()

    def definition(self) -> Json:
        """As a client lists it."""
        properties = {name: {"type": "number" if is_number else "string"} for name, is_number in self.parameters}
        schema = {"type": "object", "properties": properties, "required": list(properties)}
        return {"type": "function", "function": {"name": self.name, "description": "", "parameters": schema}}

    def call(self, values: tuple[str, ...]) -> Json:
        """A call with these values, as a chat template takes it."""
        arguments = {
            name: json.loads(value) if is_number else value
            for (name, is_number), value in zip(self.parameters, values, strict=True)
        }
        return {"type": "function", "function": {"name": self.name, "arguments": arguments}}


@dataclass(frozen=True, slots=True)
class ToolDialogue:
    """Tools that are offered, and messages that end with an answer; each of the assistant's is the only right one."""

    tools: tuple[FakeTool, ...]
    messages: tuple[Json, ...]

    def definitions(self) -> list[Json]:
        """The tools as a client lists them."""
        return [tool.definition() for tool in self.tools]


def _number(rng: random.Random) -> str:
    return str(rng.randrange(10 ** rng.randint(1, 4)))


def _value(rng: random.Random) -> str:
    """What a tool is asked about: one word mostly."""
    draw = rng.choice((draw_town, draw_town, draw_town, draw_name, draw_favourite, invented, draw_code))
    value = draw(rng)
    return f"{value} {draw_town(rng)}" if rng.random() < 0.12 else value


def _word(rng: random.Random) -> str:
    return rng.choice(_PARAMETERS) if rng.random() < 0.7 else invented(rng)


def draw_tools(rng: random.Random) -> tuple[FakeTool, ...]:
    """One to four tools, of different names and nouns."""
    nouns, ways, sums = rng.sample(NOUNS, 4), rng.sample(_WAYS, 4), rng.sample(_SUMS, 3)
    tools: dict[str, FakeTool] = {}
    for _ in range(rng.choices((1, 2, 3, 4), weights=(28, 36, 22, 14))[0]):
        kind = rng.choices(("noun", "way", "invented", "sum"), weights=(66, 10, 14, 10))[0]
        if kind == "noun":
            noun = nouns.pop()
            tool = FakeTool(_tool_name(rng, noun), noun, ((_word(rng), False),))
        elif kind == "way":
            noun = ways.pop()
            start, end = rng.choice(_WAY_PARAMETERS)
            tool = FakeTool(_tool_name(rng, noun), noun, ((start, False), (end, False)), _WAY_QUESTIONS)
        elif kind == "invented":
            name = "_".join(invented(rng) for _ in range(rng.choice((1, 2, 2))))
            tool = FakeTool(name, "", ((_word(rng), rng.random() < 0.1),) if rng.random() < 0.8 else ())
        elif sums:
            name, questions = sums.pop()
            name = rng.choice((name, name, f"{name}_numbers", f"get_{name}"))
            letters = rng.choice((("a", "b"), ("a", "b"), ("x", "y"), ("first", "second")))
            tool = FakeTool(name, "", tuple((letter, True) for letter in letters), questions)
        tools[tool.name] = tool
    return tuple(tools.values())


def _tool_name(rng: random.Random, noun: str) -> str:
    return rng.choice(_NAMES).format(n=noun, N=noun.capitalize())


def draw_result(rng: random.Random, values: tuple[str, ...]) -> str:
    """What a tool gives back."""
    words = rng.choice(
        ("sunny", "rainy", "cloudy", "warm", "cold", "windy", "open", "closed", "yes", "no", "not found")
    )
    degrees = rng.randrange(40)
    asked = values[0] if values else "it"
    return rng.choice(
        (
            words,
            words,
            _number(rng),
            _number(rng),
            invented(rng),
            _value(rng),
            f"{degrees} degrees",
            f"{words}, {degrees} degrees",
            f"it is {words} in {asked}",
            f"it is {words} and {degrees} degrees in {asked}.",
            f"{asked}: {_number(rng)}",
            small_talk_sentence(rng),
            json.dumps({_word(rng): rng.choice((degrees, words, invented(rng)))}),
            json.dumps({_word(rng): asked, _word(rng): rng.choice((degrees, words))}),
        )
    )


def _tool_turn(rng: random.Random, tool: FakeTool, num_words: int) -> list[Json]:
    """A question that needs the tool, its call or calls, the results and the answer."""
    is_pair = len(tool.parameters) == 2
    numbers = bool(tool.parameters) and tool.parameters[0][1]
    draw = _number if numbers else _value
    v, w = draw(rng), draw(rng)
    is_double = not is_pair and bool(tool.parameters) and v != w and rng.random() < 0.12
    templates: tuple[str, ...]
    if not tool.parameters:
        templates = _PLAIN_COMMANDS
    elif is_pair:
        templates = tool.questions if rng.random() < 0.8 else ("call {name} with {v} and {w}",)
    elif tool.noun and rng.random() < 0.8:
        templates = _TWO_QUESTIONS if is_double else _QUESTIONS
    else:
        templates = _TWO_COMMANDS if is_double else _COMMANDS
    question = rng.choice(templates).format(n=tool.noun, name=tool.name, v=v, w=w, now=rng.choice(_NOW))
    calls = [(v, w)] if is_pair else [(v,), (w,)] if is_double else [(v,) if tool.parameters else ()]
    results = [draw_result(rng, values) for values in calls]
    return [
        {"role": "user", "content": draw_message(rng, question, num_words)},
        {"role": "assistant", "content": "", "tool_calls": [tool.call(values) for values in calls]},
        *({"role": "tool", "content": result} for result in results),
        {"role": "assistant", "content": FOUND + BETWEEN.join(results)},
    ]


def generate_messages(rng: random.Random, tools: tuple[FakeTool, ...], filler_words: tuple[int, int]) -> Iterator[Json]:
    """Endless messages of one user and the assistant; a turn that needs no tool is one of the recall model's."""
    recall = generate_turns(rng, filler_words)
    while True:
        num_words = rng.randint(*filler_words)
        if tools and rng.random() < 0.7:
            yield from _tool_turn(rng, rng.choice(tools), num_words)
        elif not tools and rng.random() < 0.1:
            question = rng.choice(_QUESTIONS).format(n=rng.choice(NOUNS), v=_value(rng), now=rng.choice(_NOW))
            yield {"role": "user", "content": draw_message(rng, question, num_words)}
            yield {"role": "assistant", "content": NO_TOOL_ANSWER}
        else:
            turn = next(recall)
            yield {"role": "user", "content": turn.user}
            yield {"role": "assistant", "content": turn.assistant}


def draw_dialogue(rng: random.Random, filler_words: tuple[int, int]) -> tuple[tuple[FakeTool, ...], Iterator[Json]]:
    """Tools, in three dialogues of four, and endless messages; the first may be a system message."""
    tools = draw_tools(rng) if rng.random() < 0.75 else ()

    def messages() -> Iterator[Json]:
        system = draw_system(rng)
        if rng.random() < 0.15:  # words that mean nothing, as most words of a real application's do to this model
            system = " ".join(invented(rng) for _ in range(rng.randint(5, 60)))
        if system is not None:
            yield {"role": "system", "content": system}
        yield from generate_messages(rng, tools, filler_words)

    return tools, messages()


def generate_tool_dialogue(seed: int, num_messages: int, filler_words: tuple[int, int] = (0, 0)) -> ToolDialogue:
    """The dialogue of this seed, with tools: so many messages, and those that belong to the last question."""
    rng = random.Random(seed)
    tools = draw_tools(rng)
    while not tools:
        tools = draw_tools(rng)
    endless = generate_messages(rng, tools, filler_words)
    messages = list(islice(endless, num_messages))
    while messages[-1]["role"] != "assistant" or "tool_calls" in messages[-1]:
        messages.append(next(endless))
    return ToolDialogue(tools, tuple(messages))
