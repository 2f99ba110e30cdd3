"""The parameters of sampling that have one name in all endpoints and in SamplingParams, each with a value of its own."""

from __future__ import annotations

from typing import Any

SAMPLING: dict[str, Any] = {
    "temperature": 0.5,
    "top_p": 0.9,
    "seed": 7,
    "presence_penalty": 0.1,
    "frequency_penalty": 0.2,
    "top_k": 5,
    "min_p": 0.05,
    "repetition_penalty": 1.1,
    "min_tokens": 2,
    "max_thinking_tokens": 9,
    "ignore_eos": True,
}
