"""How many engine replicas there should be, by the tokens that wait and the KV that requests hold: a policy for Serve.

    autoscaling_config:
      min_replicas: 1
      max_replicas: 8
      policy: {policy_function: "deployments.cluster.autoscaling:TokensAndKV", policy_kwargs: {target_kv_use: 0.6}}

Serve applies its delays, factors and bounds to what this says. Serve's own policy counts requests, of which a long one is as
many tokens as a hundred short ones. Serve sends this module to its controller as it is: it imports nothing of this project.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

# What LLMServer.record_autoscaling_stats tells: tokens of the requests that wait; the share of the first tier's blocks that
# requests hold, without what is only kept for later; requests that run, over those that may.
WAITING_TOKENS, KV_USE, SEATS = "waiting_tokens", "kv_use", "seats"


class TokensAndKV:
    """So many replicas that each of three measures is at its target, by the one that asks for the most.

    Between the targets and `low` of them nothing changes: a replica that goes takes its conversations' homes with it.
    """

    def __init__(
        self,
        target_waiting_tokens: float = 2048.0,
        target_kv_use: float = 0.7,
        target_seats: float = 0.8,
        low: float = 0.6,
    ) -> None:
        """target_waiting_tokens: a replica. target_kv_use, target_seats, low: shares, above 0. Raises ValueError."""
        self._targets = {WAITING_TOKENS: target_waiting_tokens, KV_USE: target_kv_use, SEATS: target_seats}
        self._low = low
        for name, value in {**self._targets, "low": low}.items():
            if not value > 0:
                raise ValueError(f"{name} must be above 0, got {value}")

    def __call__(self, context: Any) -> tuple[float, dict[str, Any]]:
        """context: Serve's AutoscalingContext. Without a word of the replicas, as many as there should be anyway."""
        told: Mapping[str, Mapping[Any, float]] = context.aggregated_metrics or {}
        asked = [
            sum(of_replicas.values()) / self._targets[name] for name in self._targets if (of_replicas := told.get(name))
        ]
        if not asked:
            return float(context.target_num_replicas), {}
        # Of those that there should be: while one starts or is replaced, fewer run, and that is no reason to want fewer.
        wanted, now = max(asked), context.target_num_replicas
        if wanted > now:
            return float(math.ceil(wanted)), {}
        return float(max(1, math.ceil(wanted / self._low)) if wanted < now * self._low else now), {}
