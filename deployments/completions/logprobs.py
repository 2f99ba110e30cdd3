"""How log-probabilities are worded: in chat, in completions, and vLLM's form for those of a prompt. Plain data only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from engine.text.output import TokenLogprob, ToldPrompt


def chat_logprobs(logprobs: Sequence[TokenLogprob]) -> dict[str, Any] | None:
    if not logprobs:
        return None
    content = [
        {**_chat_token(token), "top_logprobs": [_chat_token(other) for other in token.top]} for token in logprobs
    ]
    return {"content": content, "refusal": None}


def _chat_token(token: TokenLogprob) -> dict[str, Any]:
    """bytes: to be joined with those of the tokens around it; null for a special token, which is no text."""
    token_bytes = None if token.token_bytes is None else list(token.token_bytes)
    return {"token": token.text, "logprob": token.logprob, "bytes": token_bytes}


class CompletionLogprobs:
    """The lists that this API has for the tokens of a choice.

    offset: characters before the answer.
    """

    def __init__(self) -> None:
        self.offset = 0
        self._tokens: list[str] = []
        self._values: list[float | None] = []
        self._tops: list[dict[str, float] | None] = []
        self._offsets: list[int] = []

    def add_prompt(self, told: ToldPrompt, num_top: int) -> None:
        """The first token has no probability."""
        for token, rank in told.tokens:
            self._tokens.append(_completion_token(token))
            self._values.append(token.logprob if rank else None)
            top = token._replace(top=token.top[:num_top])
            self._tops.append(_completion_top_logprobs(top) if rank else None)
            self._offsets.append(token.text_offset)

    def add(self, token: TokenLogprob) -> None:
        self._tokens.append(_completion_token(token))
        self._values.append(token.logprob)
        self._tops.append(_completion_top_logprobs(token))
        self._offsets.append(self.offset + token.text_offset)

    def value(self) -> dict[str, Any] | None:
        if not self._tokens:
            return None
        return {
            "tokens": self._tokens,
            "token_logprobs": self._values,
            "top_logprobs": self._tops,
            "text_offset": self._offsets,
        }


def prompt_logprobs(told: ToldPrompt, num_top: int) -> list[dict[str, Any] | None]:
    """As vLLM words them: null for the first token, for each other one itself and the most probable ones, by their ids."""
    entries: list[dict[str, Any] | None] = []
    for token, rank in told.tokens:
        others = enumerate(token.top[:num_top], start=1)
        ranked = ((token, rank), *((other, place) for place, other in others if other.token_id != token.token_id))
        entry = {
            str(each.token_id): {"logprob": each.logprob, "rank": place, "decoded_token": each.text}
            for each, place in ranked
        }
        entries.append(entry if rank else None)
    return entries


def _completion_top_logprobs(token: TokenLogprob) -> dict[str, float]:
    """The sampled token, then the others. Two tokens may have one text: the second one is then called by its id."""
    values = {_completion_token(token): token.logprob}
    for other in token.top:
        if other.token_id != token.token_id:
            name = _completion_token(other)
            values[f"token_id:{other.token_id}" if name in values else name] = other.logprob
    return values


def _completion_token(token: TokenLogprob) -> str:
    """A token that is no whole text goes by its bytes. This API has no other place for them."""
    is_whole = token.token_bytes is None or token.text.encode() == token.token_bytes
    return token.text if is_whole else f"bytes:{token.text}"
