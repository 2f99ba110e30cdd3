"""A line in the log for each generation that has ended, with what its client could have been told of how it came about.

As text it says the most important; with Serve's `logging_config: {encoding: JSON}` all of it is in the field `generation`.
Never what was said, and no name that a client has given but the id of its request.
"""

from __future__ import annotations

import logging
from typing import Any

from deployments.generation import GenerationRequest
from deployments.watched import End, Outcome
from engine.explanation import DIGITS

logger = logging.getLogger("ray.serve")


class RequestLog:
    """Writes the lines, at the level INFO."""

    def begin(self, request: GenerationRequest) -> tuple[GenerationRequest, End]:
        """See Watch."""

        def end(outcome: Outcome) -> None:
            told = generation_json(request, outcome)
            logger.info(
                "%s %s: %s",
                *(request.request_id, outcome.word, _in_words(told)),
                extra={"request_id": request.origin.request_id, "generation": told},
            )

        return request, end

    def close(self) -> None:
        """Every line is written by then."""


def generation_json(request: GenerationRequest, outcome: Outcome) -> dict[str, Any]:
    """What is known of a generation that has ended, as JSON."""
    told: dict[str, Any] = {
        "id": request.request_id,
        "outcome": outcome.word,
        "model": request.model,
        "tenant": request.tenant.tenant_id,
        "stream": request.stream,
        "seconds": round(outcome.ended_s - outcome.begun_s, DIGITS),
    }
    if request.origin.trace_id:
        told["trace_id"] = request.origin.trace_id
    if outcome.error is not None:
        told["error"] = outcome.error.kind
    if (delta := outcome.last) is None:
        return told
    told |= {
        "replica": outcome.replica_rank,
        "first_item_seconds": None if outcome.first_s is None else round(outcome.first_s, DIGITS),
        "finish_reason": delta.finish_reason,
        "prompt_tokens": delta.num_prompt_tokens,
        "cached_tokens": delta.num_cached_tokens,
        "output_tokens": delta.num_output_tokens,
    }
    if delta.recomputed is not None:
        told["recomputed"] = dict([delta.recomputed])
    if delta.explanation is not None:
        told["explanation"] = delta.explanation.as_json()
    return told


def _in_words(told: dict[str, Any]) -> str:
    """The same for people, on one line."""
    said = [f"{told['seconds']:.3f} s"]
    if "error" in told:
        said.append(told["error"])
    if "prompt_tokens" in told:
        said.append(
            f"{told['prompt_tokens']} prompt tokens, {told['cached_tokens']} of them cached, "
            f"{told['output_tokens']} output tokens on replica {told['replica']}"
        )
    if "explanation" in told:
        seconds: dict[str, float] = told["explanation"]["seconds"]
        said.append(", ".join(f"{phase} {value:.3f}" for phase, value in seconds.items() if value >= 0.0005))
    return "; ".join(filter(None, said))
