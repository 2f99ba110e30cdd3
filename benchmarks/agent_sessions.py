"""Real agent sessions as the client of an agent sends them: messages, tools and results, turn by turn.

A small model cannot do the agent's work, so each answer is held by a grammar to what was said in the session, in one of two
ways: as any text (`as_text`), with tools in the prompt and a client that reads the call from it; or as a call (`as_call`), by
a tool_choice that names the function and a schema that allows these arguments only. Both use the chat API alone.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.dialogue.messages import Message
from engine.workloads.conversations import read_tau_bench
from engine.workloads.session import Session

DATA = Path(__file__).parent / "data" / "airline_sessions.json"
JSON_TYPES = {str: "string", bool: "boolean", int: "integer", float: "number", list: "array", dict: "object"}
# More than any answer of the sessions has.
MAX_TOKENS = 2048

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Turn:
    """One request of a session.

    new:       the messages since the last answer: what the user says, or the result of the last call.
    text:      the answer, if it calls nothing.
    name:      the function that the answer calls, if any.
    arguments: of the call, as JSON in the model's own spelling.
    """

    new: tuple[Json, ...]
    text: str = ""
    name: str = ""
    arguments: str = "{}"

    @property
    def call_text(self) -> str:
        """The answer as a model of the Hermes family writes it."""
        if not self.name:
            return self.text
        return f'<tool_call>\n{{"name": "{self.name}", "arguments": {self.arguments}}}\n</tool_call>'


@dataclass(frozen=True, slots=True)
class AgentSession:
    """The turns of one session, and the tools that it calls, as a client lists them."""

    turns: tuple[Turn, ...]
    tools: tuple[Json, ...]


def load_sessions(path: Path = DATA) -> list[AgentSession]:
    """The committed sessions, one call a message."""
    return [_session(session) for session in read_tau_bench(path)]


def _session(session: Session) -> AgentSession:
    turns = [_turn(turn.messages, turn.answer) for turn in session.turns if turn.answer is not None]
    return AgentSession(tuple(turns), tuple(_tools(turns)))


def _turn(messages: Sequence[Message], answer: Message) -> Turn:
    new = tuple({"role": message.role, "content": message.content} for message in messages)
    if not answer.tool_calls:
        return Turn(new, text=answer.content)
    return Turn(new, name=answer.tool_calls[0].name, arguments=answer.tool_calls[0].arguments)


def _tools(turns: Sequence[Turn]) -> list[Json]:
    """Definitions that fit all calls, in the order in which they are first called."""
    properties: dict[str, Json] = {}
    for turn in turns:
        if turn.name:
            known = properties.setdefault(turn.name, {})
            for name, value in json.loads(turn.arguments).items():
                known.setdefault(name, {"type": JSON_TYPES.get(type(value), "null")})
    return [tool(name, {"type": "object", "properties": known}) for name, known in properties.items()]


def tool(name: str, parameters: Json) -> Json:
    """A tool as a client lists it."""
    description = f"{name.replace('_', ' ')} of the airline"
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


def as_text(session: AgentSession, turn: Turn) -> Json:
    """The parameters that hold an answer to a turn's text, calls written out."""
    body: Json = {"structured_outputs": {"choice": [turn.call_text]}}
    return body | ({"tools": list(session.tools), "tool_choice": "none"} if session.tools else {})


def as_call(session: AgentSession, turn: Turn) -> Json:
    """The parameters that hold an answer to a turn's call; its arguments come in the order of the schema.

    The schemas change from turn to turn: for a model whose prompt does not show them.
    """
    if not turn.name:
        return as_text(session, turn)
    values = json.loads(turn.arguments)
    schema = {
        "type": "object",
        "properties": {name: {"const": value} for name, value in values.items()},
        "required": list(values),
    }
    tools = [tool(turn.name, schema) if each["function"]["name"] == turn.name else each for each in session.tools]
    named = {"type": "function", "function": {"name": turn.name}}
    return {"tools": tools, "tool_choice": named, "parallel_tool_calls": False}


def assistant_message(turn: Turn, call_id: str) -> Json:
    """What the client sends back of an answer: the arguments are written anew, as many frameworks do."""
    if not turn.name:
        return {"role": "assistant", "content": turn.text}
    function = {"name": turn.name, "arguments": json.dumps(json.loads(turn.arguments))}
    calls = [{"id": call_id, "type": "function", "function": function}]
    return {"role": "assistant", "content": None, "tool_calls": calls}


def next_messages(turn: Turn, call_id: str) -> list[Json]:
    """The new messages of a turn. call_id: of the call whose result comes, if one does."""
    return [message | ({"tool_call_id": call_id} if message["role"] == "tool" else {}) for message in turn.new]
