"""What answers say of guessed tokens, for every endpoint: see engine/core/speculation.py."""

from __future__ import annotations

from collections.abc import Sequence

from engine.text.output import OutputDelta


def prediction_details(deltas: Sequence[OutputDelta]) -> dict[str, int]:
    """Guesses that came true, and those that did not, as OpenAI's chat counts its predicted outputs; {} without any.

    deltas: the latest of each answer.
    """
    num_guessed_tokens = sum(delta.num_guessed_tokens for delta in deltas)
    if not num_guessed_tokens:
        return {}
    num_accepted_tokens = sum(delta.num_accepted_tokens for delta in deltas)
    return {
        "accepted_prediction_tokens": num_accepted_tokens,
        "rejected_prediction_tokens": num_guessed_tokens - num_accepted_tokens,
    }
