"""How an answer came about, as clients that ask for it and the log are told. Knows no endpoint."""

from __future__ import annotations

from typing import Any

from engine.explanation import Explanation
from engine.text.output import OutputDelta

DIGITS = 6  # of seconds: microseconds


def explanation_field(delta: OutputDelta) -> dict[str, Any]:
    """The field of an answer whose last delta this is; {} if it was not asked for, or more follows."""
    if delta.explanation is None:
        return {}
    told = explanation_json(delta.explanation)
    return {"explanation": told | ({"recomputed": dict([delta.recomputed])} if delta.recomputed else {})}


def explanation_json(explanation: Explanation) -> dict[str, Any]:
    """The explanation as JSON.

    Without a route (an engine alone), nothing is said of replicas.
    """
    route, stats = explanation.route, explanation.stats
    told: dict[str, Any] = {}
    seconds: dict[str, float] = {}
    if route is not None:
        told = {"replica": route.replica_rank, "home": route.is_home, "lost_replicas": len(route.losses)}
        seconds = {"lost": route.lost_s, "route": route.seconds}
    return told | {
        "seconds": {name: round(value, DIGITS) for name, value in (seconds | explanation.seconds()).items()},
        "cached_tokens_by_tier": dict(stats.cached_by_tier),
        "computed_tokens_by_reason": dict(explanation.computed_by_reason),
        "suspensions": stats.num_suspensions,
    }
