"""A request's values for the variables of a chat template. Knows no template."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine.errors import InvalidParameterError

# Names that transformers' apply_chat_template gives a meaning of its own, so that a client's values may not have them.
RESERVED = frozenset(
    [
        "add_generation_prompt",
        "bos_token",
        "chat_template",
        "continue_final_message",
        "conversation",
        "documents",
        "eos_token",
        "kwargs",
        "max_length",
        "messages",
        "padding",
        "return_assistant_tokens_mask",
        "return_dict",
        "return_tensors",
        "sanitize_control_tokens",
        "self",
        "tokenize",
        "tokenizer_kwargs",
        "tools",
        "truncation",
    ]
)


def template_kwargs(
    given: Mapping[str, Any], *, reasoning_effort: str | None = None, enable_thinking: bool | None = None
) -> dict[str, Any]:
    """A request's values for the template's variables.

    Raises InvalidParameterError for names that are not for clients.
    given: the client's own, JSON values by name.
    reasoning_effort, enable_thinking: what the API has parameters for; they count less than `given`. None = not said.
    """
    for name in given:
        if name in RESERVED or not name.isidentifier():
            raise InvalidParameterError(
                f"chat_template_kwargs may not have {name!r}: that is no variable of a chat template; leave it out",
                param=f"chat_template_kwargs.{name}",
            )
    values: dict[str, Any] = {}
    if reasoning_effort is not None:
        values["reasoning_effort"] = reasoning_effort
    if enable_thinking is not None:
        # DeepSeek V3.1's name for it comes second.
        values |= {"enable_thinking": enable_thinking, "thinking": enable_thinking}
    return values | dict(given)
