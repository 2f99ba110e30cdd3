"""What is measured of an engine replica, as Ray metrics, and how the engine's statistics become them. Decides nothing."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from typing import Any, Literal

from deployments import vllm_metrics
from deployments.metric_definitions import (
    E2E_REQUEST_LATENCY,
    INTER_TOKEN_LATENCY,
    METRICS,
    REQUEST_DECODE_TIME,
    REQUEST_GENERATION_TOKENS,
    REQUEST_LOAD_TIME,
    REQUEST_PREFILL_TIME,
    REQUEST_PROMPT_TOKENS,
    REQUEST_QUEUE_TIME,
    REQUEST_SUSPENDED_TIME,
    REQUEST_TIME_PER_OUTPUT_TOKEN,
    ROUTER_DECISIONS,
    TIME_TO_FIRST_TOKEN,
    Series,
    make_metric,
)
from engine.core.stats import RequestStats
from engine.core.tier_table import BOTH, FAST_TIERS
from engine.text.output import OutputDelta

logger = logging.getLogger("ray.serve")

# Between two looks at the statistics, in seconds. Ray collects what a process counted every ten.
EXPORT_INTERVAL_S = 2.0

Statistics = Mapping[str, Any]
# Under which names metrics are exported.
MetricsNames = Literal["pensieve", "vllm", "both"]


HINT_OUTCOMES = ("accepted", "clipped", "refused")
# Where in the engine's statistics each counter is.
_COUNTS: dict[Series, str] = {
    Series("pensieve_requests_total", ("finished",)): "num_finished",
    Series("pensieve_requests_total", ("aborted",)): "num_aborted",
    Series("pensieve_requests_total", ("failed",)): "num_failed",
    Series("pensieve_requests_total", ("refused",)): "num_refused",
    Series("pensieve_finish_reasons_total", ("aborted",)): "num_aborted",
    Series("pensieve_finish_reasons_total", ("failed",)): "num_failed",
    Series("pensieve_finish_reasons_total", ("refused",)): "num_refused",
    Series("pensieve_prompt_tokens_total"): "num_prompt_tokens",
    Series("pensieve_generation_tokens_total"): "num_output_tokens",
    Series("pensieve_recomputed_tokens_total", ("not_loaded",)): "num_not_loaded_tokens",
    Series("pensieve_recomputed_tokens_total", ("dropped",)): "num_dropped_tokens",
    Series("pensieve_recomputed_tokens_total", ("new",)): "num_new_tokens",
    Series("pensieve_swap_bytes_total", ("in",)): "num_swap_in_bytes",
    Series("pensieve_swap_bytes_total", ("out",)): "num_swap_out_bytes",
    Series("pensieve_swap_seconds_total", ("in",)): "swap_in_seconds",
    Series("pensieve_swap_seconds_total", ("out",)): "swap_out_seconds",
    Series("pensieve_awaited_swap_bytes_total"): "num_awaited_swap_out_bytes",
    Series("pensieve_suspensions_total"): "num_suspensions",
    Series("pensieve_guessed_tokens_total"): "num_guessed_tokens",
    Series("pensieve_accepted_tokens_total"): "num_accepted_tokens",
}


def read_counters(statistics: Statistics) -> dict[Series, float]:
    """The counters of one snapshot, since the engine's start."""
    counts: dict[Series, float] = {series: statistics[key] for series, key in _COUNTS.items()}
    for tier in statistics["tiers"]:
        counts[Series("pensieve_cached_tokens_total", (tier,))] = statistics[f"num_{tier}_cached_tokens"]
    for reason, count in statistics["evictions"].items():
        counts[Series("pensieve_evictions_total", tuple(reason.split("_", 1)))] = count
    for reason, count in statistics["recomputed_tokens"].items():
        counts[Series("pensieve_changed_history_tokens_total", (reason,))] = count
    for reason, count in statistics["finish_reasons"].items():
        counts[Series("pensieve_finish_reasons_total", (reason,))] = count
    for outcome in HINT_OUTCOMES:
        counts[Series("pensieve_cache_hints_total", (outcome,))] = statistics["retention"][outcome]
    for event, count in statistics.get("handover_conversations", {}).items():
        counts[Series("pensieve_handover_conversations_total", (event,))] = count
    for name, key, suffix in (
        ("pensieve_tier_transfer_bytes_total", "num_slow_transfer_bytes", ""),
        ("pensieve_tier_written_bytes_total", "num_written_bytes", ""),
        ("pensieve_tier_transfer_seconds_total", "slow_seconds", ""),
        ("pensieve_tier_transfers_total", "slow_transfers", ""),
        ("pensieve_tier_transfers_total", "slow_refusals", "_refused"),
    ):
        for what, number in statistics.get(key, {}).items():
            tier, outcome = what.split("_", 1)
            counts[Series(name, (tier, outcome + suffix))] = number
    return counts


def read_gauges(statistics: Statistics) -> dict[Series, int]:
    """The state at one snapshot.

    A tier's free, used (holding KV that no request needs now) and pinned blocks add up to all of it.
    """
    idle = statistics["num_idle_chunks"]
    gauges = {
        Series("pensieve_num_requests_running"): statistics["num_requests_running"],
        Series("pensieve_num_requests_waiting"): statistics["num_requests_waiting"],
        Series("pensieve_num_tokens_waiting"): statistics["num_tokens_waiting"],
        Series("pensieve_hinted_tokens"): statistics["retention"]["num_kept_tokens"],
    }
    for tier in statistics["tiers"]:
        free, used = statistics[f"num_{tier}_blocks_free"], idle[tier] + (idle[BOTH] if tier in FAST_TIERS else 0)
        gauges[Series("pensieve_kv_blocks", (tier, "free"))] = free
        gauges[Series("pensieve_kv_blocks", (tier, "used"))] = used
        # The engine went on while its statistics were read: they may be out by a few blocks.
        gauges[Series("pensieve_kv_blocks", (tier, "pinned"))] = max(0, statistics[f"num_{tier}_blocks"] - free - used)
        if tier not in FAST_TIERS:
            gauges[Series("pensieve_tier_usable", (tier,))] = int(tier not in statistics.get("tier_problems", {}))
    return gauges


class CounterIncrements:
    """What the counters grew by between one snapshot of an engine's statistics and the next one."""

    def __init__(self) -> None:
        self._last: dict[Series, float] = {}

    def take(self, statistics: Statistics) -> dict[Series, float]:
        """Since the snapshot before, or the engine's start. Counters that stood still are not in it."""
        last, self._last = self._last, read_counters(statistics)
        grown = {series: count - last.get(series, 0) for series, count in self._last.items()}
        return {series: increment for series, increment in grown.items() if increment > 0}


class EngineMetrics:
    """The metrics of one engine replica.

    Counters and gauges follow the statistics every EXPORT_INTERVAL_S; times are observed as they happen.
    """

    def __init__(
        self, get_statistics: Callable[[], Statistics], names: MetricsNames = "pensieve", model_name: str = ""
    ) -> None:
        """names: under which they are exported. model_name: a label of vLLM's."""
        self._get_statistics = get_statistics
        self._increments = CounterIncrements()
        self._model_name = model_name
        own = {definition.name: definition for definition in METRICS if definition is not ROUTER_DECISIONS}
        self._is_vllm, self._is_own = names != "pensieve", names != "vllm"
        definitions = [
            *(own.values() if self._is_own else ()),
            *(vllm_metrics.definitions(own) if self._is_vllm else ()),
        ]
        self._labels = {definition.name: definition.labels for definition in definitions}
        self._metrics = {definition.name: make_metric(definition) for definition in definitions}
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Follow the statistics until `stop`, in the running event loop."""
        self._task = asyncio.get_running_loop().create_task(self._follow())

    def stop(self) -> None:
        """May be called without `start`."""
        if self._task is not None:
            self._task.cancel()

    def observe_answer(self, *, is_resumed: bool) -> Callable[[OutputDelta], None]:
        """Observes the times of one answer that begins now; call what this returns with each piece as it comes.

        is_resumed: another replica began it, so its first token and its whole time cannot be known here.
        """
        start_s = last_s = time.monotonic()
        is_first = True

        def observe(delta: OutputDelta) -> None:
            nonlocal is_first, last_s
            now = time.monotonic()
            if not is_first:
                if delta.token_ids:
                    self._observe(INTER_TOKEN_LATENCY.name, (now - last_s) / len(delta.token_ids))
            elif not is_resumed:
                self._observe(TIME_TO_FIRST_TOKEN.name, now - start_s)
            if delta.finish_reason is not None and not is_resumed:
                self._observe(E2E_REQUEST_LATENCY.name, now - start_s)
                if delta.stats is not None:
                    self._observe_request(delta.stats)
            is_first, last_s = False, now

        return observe

    def export(self) -> None:
        """Hand Ray what changed since the last time."""
        statistics = self._get_statistics()
        increments: Mapping[Series, float] = self._increments.take(statistics)
        gauges: Mapping[Series, float] = read_gauges(statistics)
        if self._is_own:
            self._set(increments, gauges)
        if self._is_vllm:
            name = self._model_name
            self._set(vllm_metrics.translate_counters(increments, name), vllm_metrics.translate_gauges(gauges, name))

    def _set(self, increments: Mapping[Series, float], gauges: Mapping[Series, float]) -> None:
        for series, increment in increments.items():
            self._metrics[series.name].inc(increment, self._tags(series))
        for series, value in gauges.items():
            self._metrics[series.name].set(value, self._tags(series))

    def _observe(self, name: str, value: float) -> None:
        if self._is_own:
            self._metrics[name].observe(value)
        if self._is_vllm:
            for other in vllm_metrics.HISTOGRAMS.get(name, ()):
                self._metrics[other].observe(value, self._tags(Series(other, (self._model_name, "0"))))

    def _observe_request(self, stats: RequestStats) -> None:
        """The account of a request that has finished."""
        phases = stats.phases
        self._observe(REQUEST_QUEUE_TIME.name, phases.queue_s)
        self._observe(REQUEST_LOAD_TIME.name, phases.load_s)
        self._observe(REQUEST_PREFILL_TIME.name, phases.prefill_s)
        self._observe(REQUEST_DECODE_TIME.name, phases.decode_s)
        self._observe(REQUEST_SUSPENDED_TIME.name, phases.suspended_s)
        self._observe(REQUEST_PROMPT_TOKENS.name, stats.num_prompt_tokens)
        self._observe(REQUEST_GENERATION_TOKENS.name, stats.num_output_tokens)
        if stats.first_token_s is not None and stats.num_output_tokens > 1:
            token_s = (stats.finished_s - stats.first_token_s) / (stats.num_output_tokens - 1)
            self._observe(REQUEST_TIME_PER_OUTPUT_TOKEN.name, token_s)

    def _tags(self, series: Series) -> dict[str, str]:
        return dict(zip(self._labels[series.name], series.values, strict=True))

    async def _follow(self) -> None:
        while True:
            try:
                self.export()
            except Exception:
                logger.exception("metrics could not be exported")  # and serving goes on
            await asyncio.sleep(EXPORT_INTERVAL_S)
