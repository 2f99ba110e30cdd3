"""How many replicas the policy asks for, alone and as Serve calls it, with what an engine replica tells."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from ray import cloudpickle
from ray.serve._private.common import DeploymentID
from ray.serve.autoscaling_policy import _apply_autoscaling_config
from ray.serve.config import AutoscalingConfig, AutoscalingContext

from deployments.cluster.autoscaling import KV_USE, SEATS, WAITING_TOKENS, TokensAndKV
from deployments.llm_server import LLMServer


def context(now: int, **told: list[float]) -> Any:
    """Of so many replicas, each with its word on a measure."""
    metrics = {name: dict(enumerate(values)) for name, values in told.items()}
    return SimpleNamespace(aggregated_metrics=metrics, current_num_replicas=now, target_num_replicas=now)


@pytest.mark.parametrize(
    ("now", "told", "wanted"),
    [
        (2, {}, 2),  # none has said anything yet
        (2, {KV_USE: [0.7, 0.7]}, 2),
        (2, {KV_USE: [0.9, 0.8]}, 3),  # 1.7 / 0.7
        (1, {WAITING_TOKENS: [9000.0], KV_USE: [0.1]}, 5),  # what asks for the most counts
        (2, {WAITING_TOKENS: [4096.0, 0.0], SEATS: [0.2, 0.2]}, 2),
        (4, {KV_USE: [0.5, 0.4, 0.5, 0.4]}, 4),  # 2.6 of 4 are needed: not few enough
        (4, {KV_USE: [0.2] * 4, SEATS: [0.0] * 4}, 2),  # 1.1 of 4
        (3, {KV_USE: [0.0] * 3, WAITING_TOKENS: [0.0] * 3}, 1),
    ],
)
def test_so_many_that_each_measure_is_at_its_target(now: int, told: dict[str, list[float]], wanted: int) -> None:
    assert TokensAndKV()(context(now, **told)) == (wanted, {})


def test_while_a_replica_starts_or_is_replaced_no_fewer_are_wanted() -> None:
    """Two should run, one does, and has what both will share."""
    told = SimpleNamespace(aggregated_metrics={KV_USE: {0: 0.7}}, current_num_replicas=1, target_num_replicas=2)
    assert TokensAndKV(target_kv_use=0.7, low=0.4)(told) == (2, {})


@pytest.mark.parametrize("use", [0.05 * step for step in range(1, 60)])
def test_what_it_asks_for_it_would_keep(use: float) -> None:
    """The same load spread over as many replicas as it asks for is no reason to ask for another number."""
    for now in (1, 3, 8):
        wanted, _ = TokensAndKV()(context(now, **{KV_USE: [use / now] * now}))
        again, _ = TokensAndKV()(context(int(wanted), **{KV_USE: [use / wanted] * int(wanted)}))
        assert again == wanted


def test_targets_have_to_be_above_0() -> None:
    with pytest.raises(ValueError, match="kv_use must be above 0, got 0"):
        TokensAndKV(target_kv_use=0)


def test_serve_takes_it_from_a_file_and_adds_its_factors_and_delays() -> None:
    config = AutoscalingConfig.model_validate(
        yaml.safe_load("""
            min_replicas: 1
            max_replicas: 4
            upscale_delay_s: 0
            upscaling_factor: 0.5
            policy:
              policy_function: "deployments.cluster.autoscaling:TokensAndKV"
              policy_kwargs: {target_waiting_tokens: 100}
        """)
    )
    policy = cloudpickle.loads(cloudpickle.dumps(config.policy.get_policy()))(**config.policy.policy_kwargs)
    told = {WAITING_TOKENS: {"a": 700.0, "b": 300.0}}
    asked = AutoscalingContext(
        DeploymentID("LLMServer", "app"),
        "LLMServer",
        "app",
        2,
        2,
        [],
        0.0,
        0.0,
        told,
        {},
        1,
        4,
        {},
        None,
        None,
        0.0,
        config,
    )
    assert policy(asked)[0] == 10
    assert _apply_autoscaling_config(policy)(asked)[0] == 2 + 0.5 * 8


def test_an_engine_replica_tells_what_the_policy_reads() -> None:
    statistics = {"tiers": ["gpu", "cpu"], "num_tokens_waiting": 300, "num_requests_running": 8}
    blocks = {"num_gpu_blocks": 100, "num_gpu_blocks_pinned": 25, "num_gpu_blocks_free": 0}
    server = SimpleNamespace(
        _engine=SimpleNamespace(get_statistics=lambda: statistics | blocks), _config=SimpleNamespace(max_num_seqs=32)
    )
    assert LLMServer.record_autoscaling_stats(server) == {WAITING_TOKENS: 300.0, KV_USE: 0.25, SEATS: 0.25}  # type: ignore[arg-type]
