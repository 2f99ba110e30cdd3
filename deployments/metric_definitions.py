"""Every metric of this application: name, kind, labels, buckets. Decides nothing.

Ray adds application, deployment and replica as labels and `ray_` to the names. No label is ever a session or a tenant, so the
number of series is bounded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from ray.serve.metrics import Counter, Gauge, Histogram

# Seconds that a request may spend in a phase: of a prefill, milliseconds; of a queue, minutes.
_PHASE_SECONDS = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 1.5, 2.5, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0),
)
_TOKENS = tuple(float(digit * 10**power) for power in range(6) for digit in (1, 2, 5))


@dataclass(frozen=True, slots=True)
class MetricDefinition:
    """labels: those that Ray does not add. boundaries: of a histogram's buckets, in its unit."""

    kind: Literal["counter", "gauge", "histogram"]
    name: str
    description: str
    labels: tuple[str, ...] = ()
    boundaries: tuple[float, ...] = ()


def _phase_time(name: str, description: str) -> MetricDefinition:
    return MetricDefinition("histogram", name, description, boundaries=_PHASE_SECONDS)


TIME_TO_FIRST_TOKEN = MetricDefinition(
    "histogram",
    "pensieve_time_to_first_token_seconds",
    "From a request's arrival at the engine replica to its first token, seconds",
    boundaries=(0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.15, 0.25, 0.5, 0.75, 1, 1.5, 2.5, 5, 7.5, 10, 20, 40, 80),
)
INTER_TOKEN_LATENCY = MetricDefinition(
    "histogram",
    "pensieve_inter_token_latency_seconds",
    "Between two pieces of an answer, divided by the tokens of the second, seconds",
    boundaries=(
        *(0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05),
        *(0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1, 2.5, 5),
    ),
)
E2E_REQUEST_LATENCY = MetricDefinition(
    "histogram",
    "pensieve_e2e_request_latency_seconds",
    "From a request's arrival at the engine replica to the end of its answer, seconds",
    boundaries=(0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 1.5, 2, 3, 5, 7.5, 10, 15, 20, 30, 60, 120, 300, 600),
)
REQUEST_QUEUE_TIME = _phase_time(
    "pensieve_request_queue_time_seconds", "That a finished request waited for its first turn, seconds"
)
REQUEST_LOAD_TIME = _phase_time(
    "pensieve_request_load_time_seconds", "That a finished request waited for chunks from slow tiers, seconds"
)
REQUEST_PREFILL_TIME = _phase_time(
    "pensieve_request_prefill_time_seconds", "That a finished request ran before its first token, seconds"
)
REQUEST_DECODE_TIME = _phase_time(
    "pensieve_request_decode_time_seconds", "That a finished request ran after its first token, seconds"
)
REQUEST_SUSPENDED_TIME = _phase_time(
    "pensieve_request_suspended_time_seconds", "That a finished request was preempted, seconds"
)
REQUEST_TIME_PER_OUTPUT_TOKEN = MetricDefinition(
    "histogram",
    "pensieve_request_time_per_output_token_seconds",
    "From the first token to the end, by the tokens after the first one, seconds; one observation per request",
    boundaries=INTER_TOKEN_LATENCY.boundaries,
)
REQUEST_PROMPT_TOKENS = MetricDefinition(
    "histogram", "pensieve_request_prompt_tokens", "Prompt tokens of a finished request", boundaries=_TOKENS
)
REQUEST_GENERATION_TOKENS = MetricDefinition(
    "histogram", "pensieve_request_generation_tokens", "Generated tokens of a finished request", boundaries=_TOKENS
)
OF_REQUESTS = (
    REQUEST_QUEUE_TIME,
    REQUEST_LOAD_TIME,
    REQUEST_PREFILL_TIME,
    REQUEST_DECODE_TIME,
    REQUEST_SUSPENDED_TIME,
    REQUEST_TIME_PER_OUTPUT_TOKEN,
    REQUEST_PROMPT_TOKENS,
    REQUEST_GENERATION_TOKENS,
)
ROUTER_DECISIONS = MetricDefinition(
    "counter",
    "pensieve_router_decisions_total",
    "Requests by what the router did with their session: sticky, spill, new or rehash",
    ("kind",),
)
METRICS = (
    MetricDefinition("gauge", "pensieve_num_requests_running", "Requests that the engine computes"),
    MetricDefinition("gauge", "pensieve_num_requests_waiting", "Requests that wait for room in the engine"),
    MetricDefinition("gauge", "pensieve_num_tokens_waiting", "Tokens of these requests"),
    MetricDefinition("gauge", "pensieve_kv_blocks", "Blocks of KV cache: free, used, pinned", ("tier", "state")),
    TIME_TO_FIRST_TOKEN,
    INTER_TOKEN_LATENCY,
    E2E_REQUEST_LATENCY,
    *OF_REQUESTS,
    MetricDefinition("counter", "pensieve_requests_total", "Requests that ended, by how", ("outcome",)),
    MetricDefinition("counter", "pensieve_finish_reasons_total", "Requests that ended, by why", ("reason",)),
    MetricDefinition("counter", "pensieve_prompt_tokens_total", "Prompt tokens of requests that began to run"),
    MetricDefinition("counter", "pensieve_generation_tokens_total", "Generated tokens"),
    MetricDefinition("counter", "pensieve_cached_tokens_total", "Prompt tokens found in the cache", ("source",)),
    MetricDefinition(
        "counter", "pensieve_recomputed_tokens_total", "Prompt tokens not found in the cache", ("reason",)
    ),
    MetricDefinition(
        "counter",
        "pensieve_changed_history_tokens_total",
        "Prompt tokens that a conversation had and that had to be computed again, because its history changed",
        ("reason",),
    ),
    MetricDefinition("counter", "pensieve_swap_bytes_total", "KV copied between GPU and CPU tier", ("direction",)),
    MetricDefinition("counter", "pensieve_swap_seconds_total", "Time of these copies", ("direction",)),
    MetricDefinition(
        "counter", "pensieve_awaited_swap_bytes_total", "KV copied to the CPU tier while the model waited for its room"
    ),
    MetricDefinition("counter", "pensieve_evictions_total", "Chunks that lost a block", ("tier", "reason")),
    MetricDefinition("counter", "pensieve_suspensions_total", "Running requests that were put back for want of blocks"),
    MetricDefinition("counter", "pensieve_guessed_tokens_total", "Guessed tokens that steps have verified"),
    MetricDefinition("counter", "pensieve_accepted_tokens_total", "Guessed tokens that came true"),
    MetricDefinition("counter", "pensieve_tier_transfer_bytes_total", "KV loaded and stored", ("tier", "direction")),
    MetricDefinition(
        "counter", "pensieve_tier_transfer_seconds_total", "Time of slow tiers for that", ("tier", "direction")
    ),
    MetricDefinition(
        "counter", "pensieve_tier_transfers_total", "Chunks, by how their transfers ended", ("tier", "outcome")
    ),
    MetricDefinition(
        "counter", "pensieve_tier_written_bytes_total", "Bytes written to the files of slow tiers", ("tier", "content")
    ),
    MetricDefinition(
        "counter",
        "pensieve_handover_conversations_total",
        "Conversations between engine replicas, by event",
        ("event",),
    ),
    MetricDefinition(
        "counter", "pensieve_cache_hints_total", "Hints on what is worth keeping, by outcome", ("outcome",)
    ),
    MetricDefinition("gauge", "pensieve_hinted_tokens", "Tokens that hints keep now"),
    MetricDefinition("gauge", "pensieve_tier_usable", "Whether a slow tier works: 1 or 0", ("tier",)),
    ROUTER_DECISIONS,
)


@dataclass(frozen=True, slots=True)
class Series:
    """One line of a graph: a metric's name and the values of its labels, in the order of the definition."""

    name: str
    values: tuple[str, ...] = ()


def make_metric(definition: MetricDefinition) -> Any:
    """The Ray metric. To be made in the process that measures, once."""
    if definition.kind == "counter":
        return Counter(definition.name, definition.description, definition.labels)
    if definition.kind == "gauge":
        return Gauge(definition.name, definition.description, definition.labels)
    return Histogram(definition.name, definition.description, list(definition.boundaries), definition.labels)
