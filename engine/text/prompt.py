"""The forms in which a context reaches the engine. Plain data, so that it travels between processes."""

from __future__ import annotations

from dataclasses import dataclass

# What a chat template adds to a message, about, in characters.
TEMPLATE_CHARS = 32


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """Messages, which the model's chat template turns into one text.

    messages: (role, content), the oldest first.
    drops_oldest: leave out the oldest ones if there are more than the window holds.
    """

    messages: tuple[tuple[str, str], ...]
    drops_oldest: bool = False

    @property
    def num_chars(self) -> int:
        """About the length of that text."""
        return sum(len(role) + len(content) + TEMPLATE_CHARS for role, content in self.messages)

    def shorter(self) -> list[ChatPrompt]:
        """Ever shorter prompts, in each of which more of the oldest messages are left out.

        A tenth of the rest goes at a time, so that a conversation that grows is cut at the same place for some turns. System
        messages and the last message stay, and no answer is the first message without its question.
        """
        system = tuple(message for message in self.messages if message[0] == "system")
        others = [message for message in self.messages if message[0] != "system"]
        prompts: list[ChatPrompt] = []
        start = 0
        while True:
            start += max(1, (len(others) - start) // 10)
            while start < len(others) and others[start][0] == "assistant":
                start += 1
            if start >= len(others):
                return prompts
            prompts.append(ChatPrompt((*system, *others[start:])))


@dataclass(frozen=True, slots=True)
class TextPrompt:
    """A text to continue."""

    text: str

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
    """

    token_ids: tuple[int, ...]
    num_chars: int


Prompt = ChatPrompt | TextPrompt | TokenPrompt
