"""The forms in which a context reaches the engine. Plain data, so that it travels between processes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """Messages (role, content), oldest first; the model's chat template turns them into one text."""

    messages: tuple[tuple[str, str], ...]

    @property
    def num_chars(self) -> int:
        return sum(len(content) for _, content in self.messages)


@dataclass(frozen=True, slots=True)
class TextPrompt:
    """A text to continue."""

    text: str

    @property
    def num_chars(self) -> int:
        return len(self.text)


@dataclass(frozen=True, slots=True)
class TokenPrompt:
    """Token ids to continue, taken as they are."""

    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class AnswerBeginning:
    """The beginning of an answer that another engine gave before it was lost: its tokens, and how many characters of it
    reached whoever asked."""

    token_ids: tuple[int, ...]
    num_chars: int


Prompt = ChatPrompt | TextPrompt | TokenPrompt
