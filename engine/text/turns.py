"""What a conversation has said as messages, so that a client's history is recognised whatever it left out.

A message is known by everything that was said before it and by what it says: its content but for the white space around it,
and its calls as JSON. What was thought, ids, and the system's messages do not count.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace

from engine.dialogue.events import ParsedAnswer
from engine.dialogue.messages import Message
from engine.dialogue.same_message import canonical_arguments
from engine.dialogue.tools import Tool

# Why tokens that a conversation had are computed again, other than that their KV is gone.
EDITED = "edited"  # the client changed or left out something of its history, or the system's message
TOOLS_CHANGED = "tools_changed"
TRUNCATED = "truncated"  # the oldest messages were left out, because the window is full
TEMPLATE_DROPPED = "template_dropped"  # the chat template leaves out what was thought in an earlier turn
RETOKENISED = "retokenised"  # the template writes an answer in other words than the model, and it was not recognised
REASONS = (EDITED, RETOKENISED, TEMPLATE_DROPPED, TOOLS_CHANGED, TRUNCATED)

MAX_TURNS = 1024
# What a turn takes besides its text.
TURN_BYTES = 400


@dataclass(frozen=True, slots=True)
class Turn:
    """An answer that the model gave.

    reasoning: what it thought before.
    beginning: of the first message, as a key.
    num_tokens: of the prompt and the answer.
    tools_key, system_key: of what the prompt had besides its messages.
    """

    reasoning: str
    beginning: bytes
    num_tokens: int
    tools_key: bytes
    system_key: bytes

    @property
    def num_bytes(self) -> int:
        """The memory that it takes, about."""
        return TURN_BYTES + len(self.reasoning)


class Turns:
    """The turns of one conversation; of more than MAX_TURNS the oldest is forgotten.

    num_bytes: the memory that they take, about.
    """

    def __init__(self) -> None:
        self._by_key: OrderedDict[bytes, Turn] = OrderedDict()
        self._beginnings: frozenset[bytes] = frozenset()
        self.num_bytes = 0

    def add(self, key: bytes, turn: Turn) -> None:
        """Remember a turn. key: of its answer, see MessageKeys."""
        old = self._by_key.pop(key, None)
        self.num_bytes += turn.num_bytes - (0 if old is None else old.num_bytes)
        self._by_key[key] = turn
        if turn.beginning not in self._beginnings:
            self._beginnings = frozenset(each.beginning for each in self._by_key.values())
        if len(self._by_key) > MAX_TURNS:
            _, oldest = self._by_key.popitem(last=False)
            self.num_bytes -= oldest.num_bytes

    def find(self, key: bytes) -> Turn | None:
        """The turn with this answer."""
        return self._by_key.get(key)

    def items(self) -> tuple[tuple[bytes, Turn], ...]:
        """(key, turn), the oldest first."""
        return tuple(self._by_key.items())

    def has_begun_so(self, key: bytes) -> bool:
        """Whether a turn followed this first message."""
        return key in self._beginnings


def _next_key(key: bytes, role: str, content: str, calls: Sequence[tuple[str, str]]) -> bytes:
    said = repr((role, content.strip(), [(name, canonical_arguments(text)) for name, text in calls]))
    return hashlib.blake2b(key + said.encode(errors="surrogatepass"), digest_size=16).digest()


@dataclass(frozen=True, slots=True)
class RecognisedChat:
    """The messages of a prompt, compared with what the conversation has said.

    messages: with what was thought, where the client left it out.
    key: of all messages. beginning: of the first one.
    turns: the answers among them that are known, the oldest first.
    is_edited: an answer comes behind the last one of these that is not known, though the first message is.
    is_bare: what was thought before an answer is neither sent nor put back.
    is_truncated: the oldest messages are left out.
    """

    messages: tuple[Message, ...]
    key: bytes
    beginning: bytes
    tools_key: bytes
    system_key: bytes
    turns: tuple[Turn, ...] = ()
    is_edited: bool = False
    is_bare: bool = False
    is_truncated: bool = False

    @classmethod
    def of(
        cls, messages: Sequence[Message], tools: Sequence[Tool], known: Turns | None, *, restores: bool
    ) -> RecognisedChat:
        """Linear in the messages.

        known: what the conversation has said; None = nothing.
        restores: what was thought is put back where the client left it out.
        """
        key, beginning, system = b"", b"", hashlib.blake2b(digest_size=16)
        shown: list[Message] = []
        turns: list[Turn] = []
        is_edited = is_bare = False
        for message in messages:
            shown.append(message)
            if message.role == "system":
                system.update(message.content.encode(errors="surrogatepass") + b"\0")
                continue
            key = _next_key(key, message.role, message.content, [(c.name, c.arguments) for c in message.tool_calls])
            beginning = beginning or key
            if message.role != "assistant" or known is None:
                continue
            turn = known.find(key)
            is_edited = turn is None and known.has_begun_so(beginning)
            if turn is not None:
                turns.append(turn)
                if turn.reasoning and not message.reasoning:
                    is_bare |= not restores
                    if restores:
                        shown[-1] = replace(message, reasoning=turn.reasoning)
        tools_key = hashlib.blake2b(repr([tool.definition() for tool in tools]).encode(errors="surrogatepass"))
        return cls(tuple(shown), key, beginning, tools_key.digest(), system.digest(), tuple(turns), is_edited, is_bare)

    def answered(self, answer: ParsedAnswer, num_tokens: int) -> tuple[bytes, Turn]:
        """The turn that this answer makes, and its key. num_tokens: of the prompt and the answer."""
        calls = [(call.name, call.arguments) for call in answer.calls]
        key = _next_key(self.key, "assistant", answer.content, calls)
        return key, Turn(answer.reasoning, self.beginning or key, num_tokens, self.tools_key, self.system_key)

    def why_again(self, num_same: int, num_known: int, prompt: str) -> tuple[str, int] | None:
        """(reason, tokens) of what the conversation had of this prompt and has to be computed again; None = nothing.

        num_same: tokens that the prompt begins with as an earlier turn did.
        num_known: of the tokens of the prompt, as many as the conversation's longest branch has.
        prompt: its text.
        """
        if self.is_edited:
            return (EDITED, num_known - num_same) if num_known > num_same else None
        last = self.turns[-1] if self.turns else None
        # The token that ended the last answer was never computed.
        if last is None or last.num_tokens - 1 <= num_same:
            return None
        num_again = last.num_tokens - 1 - num_same
        if self.is_truncated:
            return TRUNCATED, num_again
        if last.tools_key != self.tools_key:
            return TOOLS_CHANGED, num_again
        if last.system_key != self.system_key or self.is_bare:
            return EDITED, num_again
        is_dropped = any(turn.reasoning and turn.reasoning not in prompt for turn in self.turns)
        return (TEMPLATE_DROPPED if is_dropped else RETOKENISED), num_again
