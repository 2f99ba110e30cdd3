"""Whether the served model can do what a request asks, as far as that shows before the engine sees it.

Raises, and changes nothing.
"""

from __future__ import annotations

from deployments.generation import ModelCard
from deployments.http.generation_body import GenerationBody
from deployments.http.parsing import MAX_NAME_CHARS
from engine.errors import ContextLengthError, InvalidParameterError, UnknownModelError
from engine.text.prompt import ChatPrompt, Prompt, TokenPrompt


def check_model(name: str, card: ModelCard) -> None:
    """Raises UnknownModelError if another model is served."""
    if name != card.model_name:
        raise UnknownModelError(
            f"the model {name[:MAX_NAME_CHARS]!r} is not served; use {card.model_name!r}", param="model"
        )


def check_body(body: GenerationBody, card: ModelCard) -> None:
    """Raises RequestError if the model is not served, or cannot do what is asked whatever the prompt is."""
    check_model(body.model, card)
    if body.min_tokens > card.max_model_len:
        raise InvalidParameterError(
            f"min_tokens must be at most {card.max_model_len}, the size of the context window", param="min_tokens"
        )


def check_prompt(prompt: Prompt, card: ModelCard, param: str) -> None:
    """Raises ContextLengthError if the prompt cannot fit, counting a token for each message. The engine counts exactly.

    param: the endpoint's name for the prompt.
    """
    if isinstance(prompt, ChatPrompt):
        size, unit = len(prompt.messages), "messages"
    elif isinstance(prompt, TokenPrompt):
        size, unit = len(prompt.token_ids), "tokens"
    else:
        return
    if size > card.max_model_len:
        raise ContextLengthError(
            f"the context window is {card.max_model_len} tokens, but the prompt has {size} {unit}; shorten it", param
        )
