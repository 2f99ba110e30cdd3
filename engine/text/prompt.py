"""The forms in which a context reaches the engine. Plain data, so that it travels between processes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from engine.dialogue.messages import Dialogue, Message
from engine.dialogue.tools import Tool
from engine.text.transcript import Transcript


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """Messages and tools, which the model's chat template turns into one text.

    messages: the oldest first; a pair (role, content) is taken for a plain message.
    drops_oldest: leave out the oldest ones if there are more than the window holds.
    tools, template_kwargs, continues, opens_answer: see Dialogue.
    """

    messages: tuple[Message, ...]
    drops_oldest: bool = False
    tools: tuple[Tool, ...] = ()
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    continues: bool = False
    opens_answer: bool = True

    def __post_init__(self) -> None:
        messages = tuple(m if isinstance(m, Message) else Message(*m) for m in self.messages)
        object.__setattr__(self, "messages", messages)

    @property
    def num_chars(self) -> int:
        """About the length of that text."""
        values = len(repr(self.template_kwargs)) if self.template_kwargs else 0
        return sum(message.num_chars for message in self.messages) + sum(tool.num_chars for tool in self.tools) + values

    @property
    def dialogue(self) -> Dialogue:
        """What the chat template is given."""
        return Dialogue(self.messages, self.tools, self.template_kwargs, self.continues, self.opens_answer)

    def shorter(self) -> list[ChatPrompt]:
        """Ever shorter prompts, in each of which more of the oldest messages are left out.

        A tenth of the rest goes at a time, so that a conversation that grows is cut at the same place for some turns. System
        messages and the last message stay; the first other message is neither an answer without its question nor a tool's
        result without its call.
        """
        system = tuple(message for message in self.messages if message.role == "system")
        others = [message for message in self.messages if message.role != "system"]
        prompts: list[ChatPrompt] = []
        start = 0
        while True:
            start += max(1, (len(others) - start) // 10)
            while start < len(others) and others[start].role in ("assistant", "tool"):
                start += 1
            if start >= len(others):
                return prompts
            prompts.append(replace(self, messages=(*system, *others[start:]), drops_oldest=False))


@dataclass(frozen=True, slots=True)
class TextPrompt:
    """A text to continue.

    adds_special_tokens: those with which the tokenizer begins and ends texts are put around it.
    """

    text: str
    adds_special_tokens: bool = True

    @property
    def num_chars(self) -> int:
        """The length of the text."""
        return len(self.text)


@dataclass(frozen=True, slots=True)
class TokenPrompt:
    """Token ids to continue, taken as they are."""

    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class AnswerBeginning:
    """The beginning of an answer, by an engine that was lost then.

    token_ids: all tokens of it.
    num_chars: how many characters of it have reached the client.
    prompt: what it answers, as that engine computed it; None = as anybody would tokenise it.
    """

    token_ids: tuple[int, ...]
    num_chars: int
    prompt: Transcript | None = None


Prompt = ChatPrompt | TextPrompt | TokenPrompt
