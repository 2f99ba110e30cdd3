"""The messages of a conversation, and what a chat template turns into a prompt. Plain values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from engine.dialogue.tools import Tool

# What a chat template adds to a message, about, in characters.
TEMPLATE_CHARS = 32


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call that an assistant's message makes.

    arguments: a JSON text, as the client sent it; a malformed one is shown to the model as it is.
    call_id: what its result refers to.
    """

    name: str
    arguments: str = "{}"
    call_id: str = ""


@dataclass(frozen=True, slots=True)
class CacheMark:
    """What a client says of the KV of a part of its prompt.

    start None: all of the prompt up to a place in this message is worth keeping; else a piece of this message is not.
    start, end: in characters of the message's content. end None = behind the message; of a piece, to its end.
    ttl_s: to be kept for at least so long; None = what the request says of its marks. Means nothing for a piece.
    """

    start: int | None = None
    end: int | None = None
    ttl_s: float | None = None


@dataclass(frozen=True, slots=True)
class Message:
    """One message.

    role: "system", "user", "assistant" or "tool", or another one that the model's template knows.
    content: its text; nothing is "".
    reasoning: what the assistant thought before.
    tool_call_id: of the call whose result this is.
    name: of the speaker or the tool; empty if the client gave none.
    cache_marks: they change nothing of the prompt.
    """

    role: str
    content: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str = ""
    name: str = ""
    cache_marks: tuple[CacheMark, ...] = ()

    @property
    def num_chars(self) -> int:
        """Its length as text, about."""
        calls = sum(len(call.name) + len(call.arguments) + TEMPLATE_CHARS for call in self.tool_calls)
        return len(self.role) + len(self.content) + len(self.reasoning) + calls + TEMPLATE_CHARS


@dataclass(frozen=True, slots=True)
class Dialogue:
    """What a prompt is made of.

    messages: oldest first.
    tools: that the model is told of.
    template_kwargs: plain values for the template's own variables: see template_kwargs().
    continues: the answer goes on with the text of the last message instead of a new one.
    opens_answer: unless it does, the prompt ends with what begins a message of the assistant.
    """

    messages: tuple[Message, ...]
    tools: tuple[Tool, ...] = ()
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    continues: bool = False
    opens_answer: bool = True

    @classmethod
    def of(cls, messages: Sequence[tuple[str, str]]) -> Dialogue:
        """From (role, content) pairs."""
        return cls(tuple(Message(role, content) for role, content in messages))
