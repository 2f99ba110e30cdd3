"""What is measured of an engine replica, as Ray metrics, and how the engine's statistics become them.

Ray adds application, deployment and replica as labels and `ray_` to the names. No label is ever a session or a tenant,
so the number of series is bounded. Decides nothing.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ray.serve.metrics import Counter, Gauge, Histogram

from engine.core.tier_table import BOTH, FAST_TIERS
from engine.text.output import OutputDelta

logger = logging.getLogger("ray.serve")

# Between two looks at the statistics, in seconds. Ray collects what a process counted every ten.
EXPORT_INTERVAL_S = 2.0

Statistics = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class MetricDefinition:
    """labels: those that Ray does not add. boundaries: of a histogram's buckets, in seconds."""

    kind: Literal["counter", "gauge", "histogram"]
    name: str
    description: str
    labels: tuple[str, ...] = ()
    boundaries: tuple[float, ...] = ()


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
ROUTER_DECISIONS = MetricDefinition(
    "counter",
    "pensieve_router_decisions_total",
    "Requests by what the router did with their session: sticky, spill, new or rehash",
    ("kind",),
)
METRICS = (
    MetricDefinition("gauge", "pensieve_num_requests_running", "Requests that the engine computes"),
    MetricDefinition("gauge", "pensieve_num_requests_waiting", "Requests that wait for room in the engine"),
    MetricDefinition("gauge", "pensieve_kv_blocks", "Blocks of KV cache: free, used, pinned", ("tier", "state")),
    TIME_TO_FIRST_TOKEN,
    INTER_TOKEN_LATENCY,
    E2E_REQUEST_LATENCY,
    MetricDefinition("counter", "pensieve_requests_total", "Requests that ended, by how", ("outcome",)),
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
    MetricDefinition(
        "counter", "pensieve_awaited_swap_bytes_total", "KV copied to the CPU tier while the model waited for its room"
    ),
    MetricDefinition("counter", "pensieve_evictions_total", "Chunks that lost a block", ("tier", "reason")),
    MetricDefinition("counter", "pensieve_suspensions_total", "Running requests that were put back for want of blocks"),
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


HINT_OUTCOMES = ("accepted", "clipped", "refused")
# Where in the engine's statistics each counter is.
_COUNTS: dict[Series, str] = {
    Series("pensieve_requests_total", ("finished",)): "num_finished",
    Series("pensieve_requests_total", ("aborted",)): "num_aborted",
    Series("pensieve_requests_total", ("failed",)): "num_failed",
    Series("pensieve_requests_total", ("refused",)): "num_refused",
    Series("pensieve_prompt_tokens_total"): "num_prompt_tokens",
    Series("pensieve_generation_tokens_total"): "num_output_tokens",
    Series("pensieve_recomputed_tokens_total", ("not_loaded",)): "num_not_loaded_tokens",
    Series("pensieve_recomputed_tokens_total", ("dropped",)): "num_dropped_tokens",
    Series("pensieve_recomputed_tokens_total", ("new",)): "num_new_tokens",
    Series("pensieve_swap_bytes_total", ("in",)): "num_swap_in_bytes",
    Series("pensieve_swap_bytes_total", ("out",)): "num_swap_out_bytes",
    Series("pensieve_awaited_swap_bytes_total"): "num_awaited_swap_out_bytes",
    Series("pensieve_suspensions_total"): "num_suspensions",
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


def make_metric(definition: MetricDefinition) -> Any:
    """The Ray metric. To be made in the process that measures, once."""
    if definition.kind == "counter":
        return Counter(definition.name, definition.description, definition.labels)
    if definition.kind == "gauge":
        return Gauge(definition.name, definition.description, definition.labels)
    return Histogram(definition.name, definition.description, list(definition.boundaries), definition.labels)


class EngineMetrics:
    """The metrics of one engine replica.

    Counters and gauges follow the statistics every EXPORT_INTERVAL_S; times are observed as they happen.
    """

    def __init__(self, get_statistics: Callable[[], Statistics]) -> None:
        self._get_statistics = get_statistics
        self._increments = CounterIncrements()
        self._labels = {definition.name: definition.labels for definition in METRICS}
        self._metrics = {
            definition.name: make_metric(definition) for definition in METRICS if definition is not ROUTER_DECISIONS
        }
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
                    self._metrics[INTER_TOKEN_LATENCY.name].observe((now - last_s) / len(delta.token_ids))
            elif not is_resumed:
                self._metrics[TIME_TO_FIRST_TOKEN.name].observe(now - start_s)
            if delta.finish_reason is not None and not is_resumed:
                self._metrics[E2E_REQUEST_LATENCY.name].observe(now - start_s)
            is_first, last_s = False, now

        return observe

    def export(self) -> None:
        """Hand Ray what changed since the last time."""
        statistics = self._get_statistics()
        for series, increment in self._increments.take(statistics).items():
            self._metrics[series.name].inc(increment, self._tags(series))
        for series, value in read_gauges(statistics).items():
            self._metrics[series.name].set(value, self._tags(series))

    def _tags(self, series: Series) -> dict[str, str]:
        return dict(zip(self._labels[series.name], series.values, strict=True))

    async def _follow(self) -> None:
        while True:
            try:
                self.export()
            except Exception:
                logger.exception("metrics could not be exported")  # and serving goes on
            await asyncio.sleep(EXPORT_INTERVAL_S)
