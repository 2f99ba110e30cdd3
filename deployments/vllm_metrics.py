"""The same measurements under the names of vLLM's metrics, so that its dashboards and autoscalers work here.

vLLM's names have a colon, which Ray does not take: like vLLM under Ray they are `vllm_...` here and `ray_vllm_...` on Ray's
ports; GET /metrics gives them their own names back. Translates; measures nothing.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

from deployments.metric_definitions import (
    E2E_REQUEST_LATENCY,
    INTER_TOKEN_LATENCY,
    REQUEST_DECODE_TIME,
    REQUEST_GENERATION_TOKENS,
    REQUEST_PREFILL_TIME,
    REQUEST_PROMPT_TOKENS,
    REQUEST_QUEUE_TIME,
    REQUEST_TIME_PER_OUTPUT_TOKEN,
    TIME_TO_FIRST_TOKEN,
    MetricDefinition,
    Series,
)
from engine.core.tier_table import GPU

# Labels of all of them. engine: always "0", as vLLM counts the engines of one server; Ray's labels name the replica.
LABELS = ("model_name", "engine")
# What a request is called that ended so.
_REASONS = {
    "stop": "stop",
    "tool_calls": "stop",  # they end where the model stops
    "length": "length",
    "aborted": "abort",
    "failed": "error",
    "refused": "error",
}
# Histograms by the name of ours; vLLM has had more than one name for some.
HISTOGRAMS: dict[str, tuple[str, ...]] = {
    TIME_TO_FIRST_TOKEN.name: ("vllm_time_to_first_token_seconds",),
    INTER_TOKEN_LATENCY.name: ("vllm_inter_token_latency_seconds", "vllm_time_per_output_token_seconds"),
    E2E_REQUEST_LATENCY.name: ("vllm_e2e_request_latency_seconds",),
    REQUEST_QUEUE_TIME.name: ("vllm_request_queue_time_seconds",),
    REQUEST_PREFILL_TIME.name: ("vllm_request_prefill_time_seconds",),
    REQUEST_DECODE_TIME.name: ("vllm_request_decode_time_seconds",),
    REQUEST_TIME_PER_OUTPUT_TOKEN.name: ("vllm_request_time_per_output_token_seconds",),
    REQUEST_PROMPT_TOKENS.name: ("vllm_request_prompt_tokens",),
    # Of a request with several choices vLLM takes the longest; here each choice is a request of its own.
    REQUEST_GENERATION_TOKENS.name: ("vllm_request_generation_tokens", "vllm_request_max_num_generation_tokens"),
}
_COUNTERS: dict[str, tuple[str, ...]] = {
    "pensieve_prompt_tokens_total": ("vllm_prompt_tokens_total", "vllm_prefix_cache_queries_total"),
    "pensieve_generation_tokens_total": ("vllm_generation_tokens_total",),
    "pensieve_cached_tokens_total": ("vllm_prefix_cache_hits_total",),  # of all tiers
    "pensieve_suspensions_total": ("vllm_num_preemptions_total",),
    "pensieve_guessed_tokens_total": ("vllm_spec_decode_num_draft_tokens_total",),
    "pensieve_accepted_tokens_total": ("vllm_spec_decode_num_accepted_tokens_total",),
}
_GAUGES = {
    "pensieve_num_requests_running": "vllm_num_requests_running",
    "pensieve_num_requests_waiting": "vllm_num_requests_waiting",
}
_SUCCESS, _USAGE = "vllm_request_success_total", "vllm_kv_cache_usage_perc"


def definitions(own: Mapping[str, MetricDefinition]) -> tuple[MetricDefinition, ...]:
    """Those of vLLM's names, with the buckets of ours. own: ours by name."""
    found = [
        MetricDefinition("histogram", name, own[source].description, LABELS, own[source].boundaries)
        for source, names in HISTOGRAMS.items()
        for name in names
    ]
    found += [
        MetricDefinition("counter", name, own[source].description, LABELS)
        for source, names in _COUNTERS.items()
        for name in names
    ]
    found += [MetricDefinition("gauge", name, own[source].description, LABELS) for source, name in _GAUGES.items()]
    found.append(MetricDefinition("counter", _SUCCESS, "Requests that ended, by how", (*LABELS, "finished_reason")))
    found.append(MetricDefinition("gauge", _USAGE, "Share of the GPU tier that requests use now; 1 is all", LABELS))
    return tuple(found)


def translate_counters(increments: Mapping[Series, float], model_name: str) -> dict[Series, float]:
    """What vLLM's counters grew by, from what ours did."""
    found: dict[Series, float] = defaultdict(float)
    for series, increment in increments.items():
        for name in _COUNTERS.get(series.name, ()):
            found[Series(name, (model_name, "0"))] += increment
        if series.name == "pensieve_finish_reasons_total":
            found[Series(_SUCCESS, (model_name, "0", _REASONS[series.values[0]]))] += increment
    return dict(found)


def translate_gauges(gauges: Mapping[Series, float], model_name: str) -> dict[Series, float]:
    """vLLM's gauges, from ours."""
    found = {
        Series(_GAUGES[series.name], (model_name, "0")): value
        for series, value in gauges.items()
        if series.name in _GAUGES
    }
    blocks = {series.values: value for series, value in gauges.items() if series.name == "pensieve_kv_blocks"}
    of_gpu = {state: value for (tier, state), value in blocks.items() if tier == GPU}
    if total := sum(of_gpu.values()):
        found[Series(_USAGE, (model_name, "0"))] = of_gpu["pinned"] / total
    return found
