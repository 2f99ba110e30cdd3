"""Log-probabilities as clients are told them: by the texts of their tokens, with their places in a text."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from engine.core.plan import Logprobs
from engine.errors import InvalidParameterError
from engine.text.detokenizer import Detokenizer
from engine.text.output import PromptToken, TokenLogprob, ToldPrompt
from engine.text.tokenizer import Tokenizer

# Reported for a token of no probability, as OpenAI does it: JSON has no infinity.
IMPOSSIBLE_LOGPROB = -9999.0
# Tokens of a prompt whose texts are told in the event loop itself, about a millisecond's worth.
MAX_INLINE_TOKENS = 1024
# Log-probabilities of a prompt, the alternatives included: each is an object of some hundred bytes in several processes.
MAX_PROMPT_LOGPROBS = 1 << 20


def check_prompt_logprobs(num_tokens: int, num_logprobs: int | None) -> None:
    """Raises InvalidParameterError if there is more to tell of a prompt than fits into an answer.

    num_logprobs: alternatives for each token; None = nothing is told.
    """
    if num_logprobs is not None and num_tokens * (1 + num_logprobs) > MAX_PROMPT_LOGPROBS:
        raise InvalidParameterError(
            f"prompt_logprobs={num_logprobs} for the {num_tokens} tokens of the prompt are more than {MAX_PROMPT_LOGPROBS} "
            "log-probabilities; ask for fewer, or shorten the prompt",
            param="prompt_logprobs",
        )


async def tell_prompt_in_time(
    tokenizer: Tokenizer, token_ids: Sequence[int], text: str, scores: Sequence[Logprobs] | None, *, is_text: bool
) -> ToldPrompt:
    """As `tell_prompt`, in a thread if it is long."""
    if len(token_ids) + sum(len(score.top) for score in scores or ()) <= MAX_INLINE_TOKENS:
        return tell_prompt(tokenizer, token_ids, text, scores, is_text=is_text)
    return await asyncio.to_thread(tell_prompt, tokenizer, token_ids, text, scores, is_text=is_text)


def token_logprob(tokenizer: Tokenizer, token_id: int, value: float) -> TokenLogprob:
    """A token with its log-probability, whatever place it is in."""
    token_bytes = tokenizer.token_bytes[token_id]
    text = token_bytes.decode(errors="backslashreplace")
    is_text = not tokenizer.is_special(token_id)
    return TokenLogprob(token_id, text, token_bytes if is_text else None, max(value, IMPOSSIBLE_LOGPROB))


def tell_prompt(
    tokenizer: Tokenizer, token_ids: Sequence[int], text: str, scores: Sequence[Logprobs] | None, *, is_text: bool
) -> ToldPrompt:
    """The text of a prompt, and its tokens if there are scores. Linear; any thread may call it.

    text: empty = that of its tokens, special ones included.
    scores: of all tokens but the first; None = they were not asked for.
    is_text: the tokenizer has put special tokens around it, which are not in the text.
    """
    text = text or tokenizer.token_bytes.text(token_ids)
    if scores is None:
        return ToldPrompt(text)
    num_before, num_behind = tokenizer.num_added_to_texts if is_text else (0, 0)
    detokenizer = Detokenizer(tokenizer.token_bytes, (), ())
    offsets = []
    for index, token_id in enumerate(token_ids):
        offsets.append(detokenizer.text_offset(token_id))
        if num_before <= index < len(token_ids) - num_behind:
            detokenizer.append(token_id)
    # A tokenizer that begins each text with a space has a character more than the text.
    shift = int(detokenizer.num_chars > len(text))
    tokens = []
    for token_id, offset, score in zip(token_ids, offsets, (Logprobs(0.0), *scores), strict=True):
        top = tuple(token_logprob(tokenizer, other, value) for other, value in score.top)
        told = token_logprob(tokenizer, token_id, score.chosen)
        tokens.append(PromptToken(told._replace(text_offset=max(0, offset - shift), top=top), score.rank))
    return ToldPrompt(text, tuple(tokens))
