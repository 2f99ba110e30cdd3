"""From the engine's statistics to increments and states, and the times of an answer.

Ray's metrics are replaced by a notebook; test_metrics_endpoint.py has the real ones.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator
from itertools import count
from typing import Any

import pytest

from deployments import metrics, vllm_metrics
from deployments.cluster.application_metrics import select_series
from deployments.metric_definitions import METRICS, MetricDefinition, Series
from deployments.metrics import CounterIncrements, EngineMetrics, read_gauges
from engine.core.config import CacheConfig, SchedulingConfig
from engine.core.engine_core import EngineCore
from engine.core.phases import RequestPhases
from engine.core.stats import RequestStats
from engine.core.tier_table import PEER, TierSpec
from engine.text.output import OutputDelta


def core() -> EngineCore:
    return EngineCore(CacheConfig(num_gpu_blocks=4, num_cpu_blocks=8, chunk_size=8), SchedulingConfig(max_model_len=32))


def statistics_of(engine_core: EngineCore) -> dict[str, Any]:
    """As AsyncEngine gives them, for blocks of 100 bytes."""
    statistics = engine_core.get_statistics()
    return statistics | {
        "num_swap_in_bytes": statistics["num_swap_ins"] * 100,
        "num_swap_out_bytes": statistics["num_swap_outs"] * 100,
        "num_awaited_swap_out_bytes": statistics["evictions"]["gpu_swapped_out"] * 100,
        "recomputed_tokens": {"edited": 0},
        "finish_reasons": {"stop": 0, "length": 0, "tool_calls": 0},
    }


def test_increments_are_differences_of_two_snapshots() -> None:
    increments = CounterIncrements()
    engine_core = core()
    stats = engine_core.stats
    assert increments.take(statistics_of(engine_core)) == {}

    stats.num_prompt_tokens, stats.cached_tokens = 50, {"gpu": 20, "cpu": 10}
    stats.num_not_loaded_tokens, stats.num_dropped_tokens, stats.num_new_tokens = 8, 7, 5
    stats.num_output_tokens = 7
    stats.num_finished, stats.num_aborted, stats.num_failed, stats.num_refused = 4, 3, 2, 1
    stats.num_swap_ins, stats.num_swap_outs, stats.num_suspensions = 1, 2, 3
    stats.evictions |= {"gpu_reclaimed": 5, "gpu_swapped_out": 1, "cpu_copy_dropped": 6}
    assert increments.take(statistics_of(engine_core)) == {
        Series("pensieve_requests_total", ("finished",)): 4,
        Series("pensieve_requests_total", ("aborted",)): 3,
        Series("pensieve_requests_total", ("failed",)): 2,
        Series("pensieve_requests_total", ("refused",)): 1,
        Series("pensieve_finish_reasons_total", ("aborted",)): 3,
        Series("pensieve_finish_reasons_total", ("failed",)): 2,
        Series("pensieve_finish_reasons_total", ("refused",)): 1,
        Series("pensieve_prompt_tokens_total"): 50,
        Series("pensieve_generation_tokens_total"): 7,
        Series("pensieve_cached_tokens_total", ("gpu",)): 20,
        Series("pensieve_cached_tokens_total", ("cpu",)): 10,
        Series("pensieve_recomputed_tokens_total", ("not_loaded",)): 8,
        Series("pensieve_recomputed_tokens_total", ("dropped",)): 7,
        Series("pensieve_recomputed_tokens_total", ("new",)): 5,
        Series("pensieve_swap_bytes_total", ("in",)): 100,
        Series("pensieve_swap_bytes_total", ("out",)): 200,
        Series("pensieve_awaited_swap_bytes_total"): 100,
        Series("pensieve_suspensions_total"): 3,
        Series("pensieve_evictions_total", ("gpu", "reclaimed")): 5,
        Series("pensieve_evictions_total", ("gpu", "swapped_out")): 1,
        Series("pensieve_evictions_total", ("cpu", "copy_dropped")): 6,
    }
    assert increments.take(statistics_of(engine_core)) == {}

    stats.num_output_tokens += 2
    edited = {"recomputed_tokens": {"edited": 9}}
    assert increments.take(statistics_of(engine_core) | edited) == {
        Series("pensieve_generation_tokens_total"): 2,
        Series("pensieve_changed_history_tokens_total", ("edited",)): 9,
    }


def test_the_states_of_a_tier_are_all_of_its_blocks() -> None:
    statistics = statistics_of(core()) | {
        "num_requests_running": 2,
        "num_requests_waiting": 3,
        "num_tokens_waiting": 70,
        "num_gpu_blocks": 100,
        "num_gpu_blocks_free": 20,
        "num_cpu_blocks": 200,
        "num_cpu_blocks_free": 120,
        "num_idle_chunks": {"gpu": 30, "both": 10, "cpu": 65},
        "retention": {"num_kept_tokens": 48},
    }
    assert read_gauges(statistics) == {
        Series("pensieve_num_requests_running"): 2,
        Series("pensieve_num_requests_waiting"): 3,
        Series("pensieve_num_tokens_waiting"): 70,
        Series("pensieve_hinted_tokens"): 48,
        Series("pensieve_kv_blocks", ("gpu", "free")): 20,
        Series("pensieve_kv_blocks", ("gpu", "used")): 40,
        Series("pensieve_kv_blocks", ("gpu", "pinned")): 40,
        Series("pensieve_kv_blocks", ("cpu", "free")): 120,
        Series("pensieve_kv_blocks", ("cpu", "used")): 75,
        Series("pensieve_kv_blocks", ("cpu", "pinned")): 5,
    }


def test_a_further_tier_has_series_of_its_own() -> None:
    disk = TierSpec(name="disk", num_blocks=16, is_fast=False)
    engine_core = EngineCore(
        CacheConfig(num_gpu_blocks=4, num_cpu_blocks=8, chunk_size=8, slow_tiers=(disk,)),
        SchedulingConfig(max_model_len=32),
    )
    engine_core.stats.cached_tokens["disk"] = 3
    engine_core.stats.evictions |= {"cpu_reclaimed": 2, "disk_dropped": 1}
    engine_core.stats.slow_transfers |= {"disk_loaded": 4, "disk_store_failed": 5}
    engine_core.stats.slow_refusals |= {"disk_load": 6}
    engine_core.stats.slow_seconds |= {"disk_loaded": 0.25}
    statistics = statistics_of(engine_core) | {
        "num_slow_transfer_bytes": {"disk_loaded": 400, "disk_stored": 0},
        "num_written_bytes": {"disk_chunks": 700, "disk_transcripts": 80},
        "tier_problems": {"disk": "full"},
        "retention": {"accepted": 3, "clipped": 1, "refused": 0, "num_kept_tokens": 64},
        "handover_conversations": {"recalled": 9, "offered": 0},
    }
    assert CounterIncrements().take(statistics) == {
        Series("pensieve_cached_tokens_total", ("disk",)): 3,
        Series("pensieve_evictions_total", ("cpu", "reclaimed")): 2,
        Series("pensieve_evictions_total", ("disk", "dropped")): 1,
        Series("pensieve_tier_transfers_total", ("disk", "loaded")): 4,
        Series("pensieve_tier_transfers_total", ("disk", "store_failed")): 5,
        Series("pensieve_tier_transfers_total", ("disk", "load_refused")): 6,
        Series("pensieve_tier_transfer_seconds_total", ("disk", "loaded")): 0.25,
        Series("pensieve_tier_transfer_bytes_total", ("disk", "loaded")): 400,
        Series("pensieve_handover_conversations_total", ("recalled",)): 9,
        Series("pensieve_cache_hints_total", ("accepted",)): 3,
        Series("pensieve_cache_hints_total", ("clipped",)): 1,
        Series("pensieve_tier_written_bytes_total", ("disk", "chunks")): 700,
        Series("pensieve_tier_written_bytes_total", ("disk", "transcripts")): 80,
    }
    assert read_gauges(statistics)[Series("pensieve_tier_usable", ("disk",))] == 0
    assert read_gauges(statistics | {"tier_problems": {}})[Series("pensieve_tier_usable", ("disk",))] == 1
    idle = {"gpu": 1, "both": 1, "cpu": 2, "disk": 5}
    gauges = read_gauges(statistics | {"num_disk_blocks_free": 10, "num_idle_chunks": idle})
    states = {
        series.values[1]: value
        for series, value in gauges.items()
        if len(series.values) > 1 and series.values[0] == "disk"
    }
    assert states == {"free": 10, "used": 5, "pinned": 1}


def test_transfers_between_replicas_have_series_of_their_own() -> None:
    engine_core = EngineCore(
        CacheConfig(
            num_gpu_blocks=4,
            num_cpu_blocks=8,
            chunk_size=8,
            slow_tiers=(TierSpec(name=PEER, num_blocks=16, is_fast=False, is_store=False),),
        ),
        SchedulingConfig(max_model_len=32),
    )
    engine_core.stats.slow_transfers |= {"peer_loaded": 1, "peer_sent": 2, "peer_load_gone": 3}
    engine_core.stats.slow_refusals |= {"peer_load": 4, "peer_send": 5}
    engine_core.stats.slow_seconds |= {"peer_sent": 0.5}
    assert CounterIncrements().take(statistics_of(engine_core)) == {
        Series("pensieve_tier_transfers_total", ("peer", "loaded")): 1,
        Series("pensieve_tier_transfers_total", ("peer", "sent")): 2,
        Series("pensieve_tier_transfers_total", ("peer", "load_gone")): 3,
        Series("pensieve_tier_transfers_total", ("peer", "load_refused")): 4,
        Series("pensieve_tier_transfers_total", ("peer", "send_refused")): 5,
        Series("pensieve_tier_transfer_seconds_total", ("peer", "sent")): 0.5,
    }


def test_names_are_what_prometheus_expects() -> None:
    assert len({definition.name for definition in METRICS}) == len(METRICS)
    for definition in METRICS:
        assert definition.name.startswith("pensieve_")
        assert definition.name.endswith("_total") == (definition.kind == "counter")
        assert definition.name.endswith(("_seconds", "prompt_tokens", "generation_tokens")) == (
            definition.kind == "histogram"
        )
        assert not {"session", "session_id", "tenant", "request_id", "application", "deployment", "replica"} & {
            *definition.labels
        }
        assert list(definition.boundaries) == sorted(set(definition.boundaries))


class Notebook:
    """Stands in for all of Ray's metrics."""

    def __init__(self) -> None:
        self.counts: Counter[tuple[str, ...]] = Counter()
        self.states: dict[tuple[str, ...], float] = {}
        self.times: list[tuple[str, float]] = []

    def make_metric(self, definition: MetricDefinition) -> Any:
        notebook, name, labels = self, definition.name.removeprefix("pensieve_"), definition.labels

        class Metric:
            def inc(self, value: float, tags: dict[str, str]) -> None:
                notebook.counts[(name, *(tags[label] for label in labels))] += value  # type: ignore[assignment]

            def set(self, value: float, tags: dict[str, str]) -> None:
                notebook.states[(name, *(tags[label] for label in labels))] = value

            def observe(self, value: float, tags: dict[str, str] | None = None) -> None:
                assert set(tags or {}) == set(labels)
                notebook.times.append((name, value))

        return Metric()


@pytest.fixture
def notebook(monkeypatch: pytest.MonkeyPatch) -> Notebook:
    notebook = Notebook()
    monkeypatch.setattr(metrics, "make_metric", notebook.make_metric)
    return notebook


def test_export(notebook: Notebook) -> None:
    engine_core = core()
    engine_metrics = EngineMetrics(lambda: statistics_of(engine_core))
    engine_core.stats.num_output_tokens = 3
    engine_core.stats.evictions["gpu_dropped"] = 2
    engine_metrics.export()
    engine_core.stats.num_output_tokens = 5
    engine_metrics.export()
    assert notebook.counts == {("generation_tokens_total",): 5, ("evictions_total", "gpu", "dropped"): 2}
    assert notebook.states == {
        ("num_requests_running",): 0,
        ("num_requests_waiting",): 0,
        ("num_tokens_waiting",): 0,
        ("hinted_tokens",): 0,
        ("kv_blocks", "gpu", "free"): 4,
        ("kv_blocks", "gpu", "used"): 0,
        ("kv_blocks", "gpu", "pinned"): 0,
        ("kv_blocks", "cpu", "free"): 8,
        ("kv_blocks", "cpu", "used"): 0,
        ("kv_blocks", "cpu", "pinned"): 0,
    }


async def test_follows_the_statistics_until_stopped_whatever_happens(
    notebook: Notebook, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(logging.getLogger("ray.serve"), "propagate", True)
    monkeypatch.setattr(metrics, "EXPORT_INTERVAL_S", 0.0)
    engine_core = core()
    asked = count()

    def get_statistics() -> dict[str, Any]:
        if next(asked) == 1:
            raise KeyError("a bug")
        return statistics_of(engine_core)

    engine_metrics = EngineMetrics(get_statistics)
    engine_metrics.start()
    await asyncio.sleep(0)
    engine_core.stats.num_output_tokens = 3
    for _ in range(5):
        await asyncio.sleep(0)
    assert notebook.counts == {("generation_tokens_total",): 3}
    assert "metrics could not be exported" in caplog.text
    engine_metrics.stop()
    await asyncio.sleep(0)
    num_asked = next(asked)
    for _ in range(5):
        await asyncio.sleep(0)
    assert next(asked) == num_asked + 1


class Answer:
    """Three deltas: at 2 s, at 2.5 s, and two tokens at 3.5 s, of a clock that stands still otherwise."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        self.is_closed = False
        monkeypatch.setattr(metrics.time, "monotonic", lambda: self.now)

    async def deltas(self) -> AsyncIterator[OutputDelta]:
        try:
            self.now += 2.0
            yield OutputDelta(token_ids=(1,))
            self.now += 0.5
            yield OutputDelta(token_ids=(2,))
            self.now += 1.0
            yield OutputDelta(token_ids=(3, 4), finish_reason="stop")
        finally:
            self.is_closed = True


@pytest.fixture
def answer(monkeypatch: pytest.MonkeyPatch) -> Answer:
    return Answer(monkeypatch)


@pytest.fixture
def engine_metrics(notebook: Notebook) -> EngineMetrics:
    return EngineMetrics(dict)


async def test_times_of_an_answer(engine_metrics: EngineMetrics, notebook: Notebook, answer: Answer) -> None:
    observe = engine_metrics.observe_answer(is_resumed=False)
    async for delta in answer.deltas():
        observe(delta)
    assert notebook.times == [
        ("time_to_first_token_seconds", 2.0),
        ("inter_token_latency_seconds", 0.5),
        ("inter_token_latency_seconds", 0.5),
        ("e2e_request_latency_seconds", 3.5),
    ]


async def test_a_resumed_answer_has_no_first_token_and_no_whole_time(
    engine_metrics: EngineMetrics, notebook: Notebook, answer: Answer
) -> None:
    observe = engine_metrics.observe_answer(is_resumed=True)
    async for delta in answer.deltas():
        observe(delta)
    assert notebook.times == [("inter_token_latency_seconds", 0.5), ("inter_token_latency_seconds", 0.5)]


def account() -> RequestStats:
    return RequestStats(
        num_prompt_tokens=40,
        num_cached_tokens=0,
        num_loaded_tokens=0,
        num_not_loaded_tokens=0,
        num_dropped_tokens=0,
        num_new_tokens=40,
        num_output_tokens=5,
        num_computed_tokens=44,
        num_suspensions=0,
        arrival_s=10.0,
        first_token_s=13.0,
        finished_s=15.0,
        phases=RequestPhases(queue_s=1.0, load_s=0.5, prefill_s=1.5, decode_s=1.75, suspended_s=0.25),
    )


def test_a_finished_request_is_observed_by_phase(
    engine_metrics: EngineMetrics, notebook: Notebook, answer: Answer
) -> None:
    engine_metrics.observe_answer(is_resumed=False)(OutputDelta(finish_reason="stop", stats=account()))
    assert dict(notebook.times) == {
        "time_to_first_token_seconds": 0.0,
        "e2e_request_latency_seconds": 0.0,
        "request_queue_time_seconds": 1.0,
        "request_load_time_seconds": 0.5,
        "request_prefill_time_seconds": 1.5,
        "request_decode_time_seconds": 1.75,
        "request_suspended_time_seconds": 0.25,
        "request_prompt_tokens": 40,
        "request_generation_tokens": 5,
        "request_time_per_output_token_seconds": 0.5,
    }
    engine_metrics.observe_answer(is_resumed=True)(OutputDelta(finish_reason="stop", stats=account()))
    assert len(notebook.times) == 10, "its phases are of two replicas"


# What vLLM's own Grafana dashboard (examples/observability/prometheus_grafana/grafana.json, Apache-2.0) asks for, and what
# Kubernetes' gateway for inference and vLLM's production stack scale and route by.
VLLM_DASHBOARD = (
    "vllm:e2e_request_latency_seconds_bucket",
    "vllm:prompt_tokens_total",
    "vllm:generation_tokens_total",
    "vllm:inter_token_latency_seconds_bucket",
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:time_to_first_token_seconds_bucket",
    "vllm:kv_cache_usage_perc",
    "vllm:request_prompt_tokens_bucket",
    "vllm:request_generation_tokens_bucket",
    "vllm:request_success_total",
    "vllm:request_queue_time_seconds_sum",
    "vllm:request_prefill_time_seconds_sum",
    "vllm:request_decode_time_seconds_sum",
    "vllm:request_max_num_generation_tokens_sum",
    "vllm:prefix_cache_queries_total",
    "vllm:prefix_cache_hits_total",
    "vllm:num_preemptions_total",
    "vllm:time_per_output_token_seconds_bucket",
    "vllm:request_time_per_output_token_seconds_bucket",
)


@pytest.mark.parametrize("names", ["vllm", "both"])
def test_all_that_vllms_dashboard_asks_for_is_there_by_that_name(notebook: Notebook, names: Any) -> None:
    engine_core = core()
    engine_metrics = EngineMetrics(lambda: statistics_of(engine_core), names, "a model")
    stats = engine_core.stats
    stats.num_prompt_tokens, stats.num_output_tokens, stats.num_suspensions = 40, 5, 2
    stats.cached_tokens |= {"gpu": 10, "cpu": 20}
    stats.num_aborted = 1
    engine_metrics.export()
    observe = engine_metrics.observe_answer(is_resumed=False)
    observe(OutputDelta(token_ids=(1,)))
    observe(OutputDelta(token_ids=(2,), finish_reason="stop", stats=account()))
    of_vllm = ("a model", "0")
    own = {key: count for key, count in notebook.counts.items() if not key[0].startswith("vllm_")}
    assert bool(own) == (names == "both")
    assert {key: count for key, count in notebook.counts.items() if key not in own} == {
        ("vllm_prompt_tokens_total", *of_vllm): 40,
        ("vllm_prefix_cache_queries_total", *of_vllm): 40,
        ("vllm_prefix_cache_hits_total", *of_vllm): 30,
        ("vllm_generation_tokens_total", *of_vllm): 5,
        ("vllm_num_preemptions_total", *of_vllm): 2,
        ("vllm_request_success_total", *of_vllm, "abort"): 1,
    }
    assert notebook.states[("vllm_kv_cache_usage_perc", *of_vllm)] == 0
    given = {key[0] for key in (*notebook.counts, *notebook.states)}
    given |= {f"{name}{suffix}" for name, _ in notebook.times for suffix in ("_bucket", "_sum", "_count")}
    exported = "".join(f'ray_{name}{{application="x"}} 1\n' for name in sorted(given))
    shown = select_series([exported], 'application="x"')
    assert {line.split("{")[0] for line in shown.splitlines()} >= set(VLLM_DASHBOARD)
    assert "ray_vllm" not in shown


def test_how_full_vllms_cache_is_are_the_blocks_in_use() -> None:
    gauges = {Series("pensieve_kv_blocks", ("gpu", state)): n for state, n in (("free", 5), ("used", 3), ("pinned", 2))}
    gauges[Series("pensieve_kv_blocks", ("cpu", "pinned"))] = 90
    assert vllm_metrics.translate_gauges(gauges, "m") == {Series("vllm_kv_cache_usage_perc", ("m", "0")): 0.2}
