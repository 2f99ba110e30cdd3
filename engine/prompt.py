"""The forms in which a context reaches the engine. Plain data, so that it travels between processes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """Messages (role, content), oldest first; the model's chat template turns them into one text."""

    messages: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class TextPrompt:
    """A text to continue."""

    text: str


@dataclass(frozen=True, slots=True)
class TokenPrompt:
    """Token ids to continue, taken as they are."""

    token_ids: tuple[int, ...]


Prompt = ChatPrompt | TextPrompt | TokenPrompt
