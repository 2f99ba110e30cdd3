"""What chat completions and completions have in common besides the form of an answer: how many, and towards which tokens.

Knows no HTTP library, no engine and no Ray.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any, Self

from pydantic import BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from deployments.completions.answer_forms import FormedBody
from deployments.generation import GenerationRequest
from deployments.http.generation_body import IGNORED, SessionKey
from engine.core.grammar import GrammarSpec
from engine.core.request import MAX_LOGIT_BIAS, MAX_LOGPROBS, SamplingParams
from engine.text.prompt import ChatPrompt, Prompt, TextPrompt, TokenPrompt

MAX_N = 16
MAX_PROMPTS = 128
MAX_ID_DIGITS = 10

CHOICES_IGNORED = IGNORED | {"spaces_between_special_tokens"}
CHOICES_NOT_IMPLEMENTED: dict[str, tuple[Any, ...]] = {
    # vLLM's own; all but the salt change the answer, and who gives that one wants more than to be ignored.
    "allowed_token_ids": ([],),
    "bad_words": ([],),
    "cache_salt": ("",),
    "chat_template": (),
    "documents": ([],),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "length_penalty": (1,),
    "logits_processors": ([],),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
}


def _check_bias(bias: Any) -> Any:
    """Token ids are texts, as JSON has them."""
    if not isinstance(bias, dict):
        raise PydanticCustomError("invalid", "must be an object that gives token ids a number")
    if len(bias) > MAX_LOGIT_BIAS:
        raise PydanticCustomError("invalid", f"must have at most {MAX_LOGIT_BIAS} token ids")
    for name in bias:
        is_number = isinstance(name, str) and name.isascii() and name.isdecimal() and len(name) <= MAX_ID_DIGITS
        if not is_number or str(int(name)) != name:
            raise PydanticCustomError("invalid", "must have token ids as its names, such as 42")
    return bias


Bias = Annotated[float, Field(ge=-100.0, le=100.0)]


class ChoicesBody(FormedBody):
    """A body that may ask for several answers, to one prompt or to each of several."""

    ignored = CHOICES_IGNORED

    conversation_id: SessionKey | None = None
    n: Annotated[int, Field(ge=1, le=MAX_N)] = 1
    prompt_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    logit_bias: Annotated[dict[str, Bias], BeforeValidator(_check_bias, json_schema_input_type=dict[str, Bias])] = (
        Field(default={})
    )

    @property
    @abstractmethod
    def prompts(self) -> Sequence[ChatPrompt | TextPrompt | TokenPrompt]:
        """What is answered, each `n` times. Raises InvalidParameterError."""

    @property
    def num_prompts(self) -> int:
        return 1

    @property
    def num_choices(self) -> int:
        return self.num_prompts * self.n

    @model_validator(mode="after")
    def _check_prompt_logprobs(self) -> Self:
        if self.prompt_logprobs is not None and self.stream:
            message = "only allowed when stream is false"
            raise PydanticCustomError("invalid", message, {"param": "prompt_logprobs"})
        return self

    @property
    def num_prompt_logprobs(self) -> int | None:
        """How many alternatives are wanted for each token of the prompt; None = its log-probabilities are not wanted."""
        return self.prompt_logprobs

    @property
    def shows_prompt(self) -> bool:
        """Whether the text of the prompt is a part of the answer."""
        return False

    def generation_request(self, prompt: Prompt, **options: Any) -> GenerationRequest:
        return replace(
            super().generation_request(prompt, **options),
            return_prompt_text=self.shows_prompt,
            shows_special_tokens=not self.skip_special_tokens,
            shows_stop_string=self.include_stop_str_in_output,
        )

    def _sampling_params(
        self, max_tokens: int | None, logprobs: int | None, grammar: GrammarSpec | None = None
    ) -> SamplingParams:
        bias = tuple((int(name), amount) for name, amount in self.logit_bias.items())
        params = super()._sampling_params(max_tokens, logprobs, grammar)
        return replace(params, logit_bias=bias, prompt_logprobs=self.num_prompt_logprobs)
